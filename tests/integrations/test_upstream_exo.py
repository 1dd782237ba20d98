"""The adapter for upstream exo, with stand-ins for upstream's types and the fake runner as its process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

STAND_INS = ROOT / "tests" / "support" / "upstream"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tools %}{{ tools }}{% endif %}assistant:"
)

DRIVER = """
import json, os, sys, time
from exo.shared.types.backends import Backend
from exo.shared.types.chunks import ErrorChunk, PrefillProgressChunk, TokenChunk, ToolCallChunk
from exo.shared.types.common import ModelId
from exo.shared.types.tasks import TaskId, TextGeneration
from exo.shared.types.text_generation import TextGenerationTaskParams
from exo.shared.models.model_cards import ModelCard
from exo.shared.types.worker.instances import BoundInstance, LlamaCppInstance, Shard
from exo.shared.types.worker.runner_response import CancelledResponse, FinishedResponse
from exo.utils.channels import MpReceiver
from exo.worker.engines.llama_cpp.engine import LlamaCppBuilder

cancels = MpReceiver()
builder = LlamaCppBuilder(ModelId("me/model"), cancels)
card = ModelCard("me/model", 18, ["model.gguf"])
told = {"chunks": {}, "loading": [], "failure": ""}
script = json.loads(sys.argv[1])
try:
    bound = BoundInstance(LlamaCppInstance(Backend.LlamaCppCpu), Shard(card))
    told["loading"] = [each.layers_loaded for each in builder.load(bound)]
    engine = builder.build()
    engine.warmup()
    for name, params in script["tasks"].items():
        engine.submit(TextGeneration(TaskId(name), TextGenerationTaskParams(**params)))
        told["chunks"][name] = []
    open_tasks, deadline = set(script["tasks"]), time.monotonic() + 600
    while open_tasks and time.monotonic() < deadline:
        for task, each in engine.step():
            made = each.model_dump() if hasattr(each, "model_dump") else {}
            told["chunks"][task].append({"kind": type(each).__name__, **made})
            if task in script["cancel"] and isinstance(each, TokenChunk):
                cancels.items.append(task)
            if isinstance(each, FinishedResponse | CancelledResponse):
                open_tasks.discard(task)
    engine.close()
except Exception as error:
    told["failure"] = f"{type(error).__name__}: {error}"
    builder.close()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package ``exo`` of the stand-ins and the adapter, beside a package ``exo_llama_cpp`` with the fake runner."""
    folder = tmp_path_factory.mktemp("upstream")
    shutil.copytree(STAND_INS, folder, dirs_exist_ok=True)
    package = folder / "exo_llama_cpp"
    package.mkdir(exist_ok=True)
    (package / "__main__.py").symlink_to(ROOT / "tests" / "support" / "fake_llama_cpp.py")
    (package / "__init__.py").symlink_to(ROOT / "integrations" / "exo_llama_cpp" / "__init__.py")
    (package / "tree").symlink_to(ROOT / "src")
    return folder


def run(tree: Path, tasks: dict[str, Any], *, cancel: tuple[str, ...] = (), **table: object) -> dict[str, Any]:
    """What the engine has said of each task."""
    settings = json.dumps({"chat_template": TEMPLATE, **table})
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}", "FAKE_TABLE": settings}
    env.pop("EXO_LLAMA_CPP_PYTHON", None)
    script = json.dumps({"tasks": tasks, "cancel": cancel})
    done = subprocess.run([sys.executable, "-P", "-c", DRIVER, script], env=env, capture_output=True, check=True)
    return json.loads(done.stdout)


def asked(text: str = "hello", **params: object) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": text}], "max_output_tokens": 8, "temperature": 0.0, **params}


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(each["text"] for each in chunks if each["kind"] == "TokenChunk")


def test_a_model_loads_with_progress_in_its_own_layers_and_answers(tree: Path) -> None:
    told = run(tree, {"one": asked(bench=True)})
    assert told["failure"] == ""
    assert told["loading"] == [0, 9]
    chunks = told["chunks"]["one"]
    assert [chunks[0]["kind"], chunks[-1]["kind"]] == ["PrefillProgressChunk", "FinishedResponse"]
    last = chunks[-2]
    assert len(text_of(chunks)) == last["usage"]["completion_tokens"] == last["stats"]["generation_tokens"] == 8
    assert last["finish_reason"] == "length"
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 8
    assert all(each["finish_reason"] is None for each in chunks[:-2] if each["kind"] == "TokenChunk")


def test_a_request_that_cannot_be_served_ends_alone(tree: Path) -> None:
    tasks = {
        "long": asked("x" * 5000),
        "picture": asked(images=["data"]),
        "hot": asked(temperature=-1),
        "fine": asked(),
    }
    told = run(tree, tasks)
    assert told["failure"] == ""
    for name, expected in (("long", "5"), ("picture", "reads no pictures"), ("hot", "temperature")):
        error, end = told["chunks"][name][-2:]
        assert (error["kind"], end["kind"]) == ("ErrorChunk", "FinishedResponse")
        assert expected in error["error_message"]
    assert told["chunks"]["fine"][-1]["kind"] == "FinishedResponse"
    assert len(text_of(told["chunks"]["fine"])) == 8


def test_a_cancelled_task_ends_and_the_others_go_on(tree: Path) -> None:
    tasks = {"gone": asked(max_output_tokens=3000), "stays": asked("other", max_output_tokens=50)}
    told = run(tree, tasks, cancel=("gone",), step_seconds=0.002)
    assert told["failure"] == ""
    assert told["chunks"]["gone"][-1]["kind"] == "CancelledResponse"
    assert len(text_of(told["chunks"]["stays"])) == 50


def test_every_token_has_its_log_probability_and_alternatives(tree: Path) -> None:
    chunks = run(tree, {"one": asked(bench=True, logprobs=True, top_logprobs=2)})["chunks"]["one"]
    tokens = [each for each in chunks if each["kind"] == "TokenChunk" and each["logprob"] is not None]
    assert len(tokens) == 8
    assert all(len(each["top_logprobs"]) == 2 for each in tokens)


def test_a_process_that_dies_is_an_error_that_names_its_status(tree: Path) -> None:
    told = run(tree, {"one": asked(max_output_tokens=100)}, die_after=5)
    assert told["failure"] == "LlamaCppError: llama.cpp ended with status -9"


def test_a_model_that_does_not_load_is_an_error_with_the_runners_words(tree: Path) -> None:
    told = run(tree, {}, fail_load="model.gguf: no such file")
    assert told["failure"] == "LlamaCppError: model_load_failed: model.gguf: no such file"


CALLS = """
import json
from exo.worker.engines.llama_cpp.mapping import Reply
from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.registry import output_format
from exo.worker.protocol.events import Delta, Finished, Usage
tool = Tool("look", "", {"type": "object", "properties": {"at": {"type": "string"}}})
parser = output_format(None, "hermes").parser(tools=[tool], in_reasoning=False)
reply, kinds = Reply("me/model", parser, 7, 0.0), []
text = 'Yes.<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>'
for token, piece in enumerate(text):
    kinds += [each.text for each in reply.chunks(Delta(id="a", tokens=(token,), text=piece), 1.0)]
usage = Usage(prompt_tokens=4, completion_tokens=len(text), cached_tokens=3)
*_, last = reply.chunks(Finished(id="a", reason="stop", usage=usage), 2.0)
print(json.dumps(["".join(kinds).strip(), last.model_dump()]))
"""


def test_calls_are_handed_over_whole_with_the_usage(tree: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-P", "-c", CALLS], env=env, capture_output=True, check=True)
    text, last = json.loads(done.stdout)
    assert text == "Yes."
    assert last["finish_reason"] == "tool_calls"
    assert [(each["name"], json.loads(each["arguments"])) for each in last["tool_calls"]] == [("look", {"at": "it"})]
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert last["stats"]["prefix_cache_hit"] == "exact"


ROUTES = """
from exo.shared.models.model_cards import ModelCard
from exo.shared.types.backends import Backend as B
from exo.shared.types.worker.instances import InstanceMeta as Kind
from exo.worker.engines.llama_cpp.placement import choose
here = [B.MlxCpu, B.LlamaCppCpu]
gguf = ModelCard("me/gguf", backends=[B.LlamaCppCuda, B.LlamaCppCpu])
both = ModelCard("me/both", backends=[B.LlamaCppCpu, B.MlxCpu])
metal = ModelCard("me/metal", backends=[B.MlxMetal])
assert choose(Kind.MlxRing, gguf, here) == (Kind.LlamaCpp, B.LlamaCppCpu), "MLX reads no GGUF files"
assert choose(Kind.MlxRing, both, here) == (Kind.MlxRing, B.MlxCpu), "what was asked for, if the card knows it"
assert choose(Kind.MlxJaccl, both, here) == (Kind.MlxJaccl, B.MlxCpu)
assert choose(Kind.LlamaCpp, both, here) == (Kind.LlamaCpp, B.LlamaCppCpu)
for asked, card, present in ((Kind.MlxRing, metal, here), (Kind.LlamaCpp, both, [B.MlxCpu]), (Kind.LlamaCpp, gguf, [])):
    try:
        print(choose(asked, card, present))
    except ValueError as error:
        assert "serve" in str(error), error
    else:
        raise AssertionError(card)
import anyio
from exo.worker.engines.llama_cpp.probe import llama_cpp_backends
assert [each.value for each in anyio.run(llama_cpp_backends)] == ["LlamaCppCpu"]
import os
os.environ["EXO_LLAMA_CPP_PYTHON"] = "/nonexistent"
assert anyio.run(llama_cpp_backends) == []
"""


def test_placement_follows_the_card_and_the_probe_tells_what_there_is(tree: Path) -> None:
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-P", "-c", ROUTES], env=env, check=True)


COMMANDS = """
from exo.worker.engines.llama_cpp.mapping import generate
from exo.chat.output.registry import output_format
from exo.shared.types.text_generation import TextGenerationTaskParams
form = output_format(None, "none")
def made(**fields):
    return generate("a", TextGenerationTaskParams(**fields), [], form)
assert made().cache_prompt
assert not made(bench=True).cache_prompt
assert made(bench=True, use_prefix_cache=True).cache_prompt
assert made().sampling.repetition_window == 20
assert made(repetition_context_size=64).sampling.repetition_window == 64
"""


def test_a_benchmark_bypasses_the_prefix_cache_and_the_penalty_has_upstreams_window(tree: Path) -> None:
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
    subprocess.run([sys.executable, "-P", "-c", COMMANDS], env=env, check=True)
