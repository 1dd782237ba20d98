"""Upstream's whole node with the adapter, and upstream's own tests of the files that the adapter's edits touch.

EXO_UPSTREAM names a checkout of upstream, EXO_UPSTREAM_PYTHON a Python 3.13 with upstream's dependencies and pytest.
"""

import json
import os
import subprocess
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import JsonValue

from tests.support.tiny import Shape, write_gguf, write_scripted
from tests.support.tiny.tool_template import TEMPLATE
from tests.support.upstream_node.edits import edited
from tests.support.upstream_node.node import add_model, environment, running, state, statuses, until

UPSTREAM, PYTHON = os.environ.get("EXO_UPSTREAM", ""), os.environ.get("EXO_UPSTREAM_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not (UPSTREAM and PYTHON), reason="needs EXO_UPSTREAM and EXO_UPSTREAM_PYTHON, see docs/upstream.md"
)
TABLE: dict[str, JsonValue] = {"n_ctx": 2048, "slots": 4, "threads": 1, "chat_template": TEMPLATE}
TINY, TALKER = "me/tiny", "me/talker"
CALL = ("<tool_call>", '{"name": "look", "arguments": {"place": "here"}}', "</tool_call>")
CARD = """model_id = "{model}"
n_layers = 2
hidden_size = 64
supports_tensor = false
tasks = ["TextGeneration"]
backends = ["LlamaCppCuda", "LlamaCppCpu"]
files = ["model.gguf"]

[storage_size]
in_bytes = 1000000
"""
THEIR_TESTS = ("master", "download", "shared", "worker/tests/unittests/test_plan")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited(Path(UPSTREAM), tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="module")
def node(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    """Both models are placed."""
    home = tmp_path_factory.mktemp("home")
    write_gguf(add_model(home, TINY, CARD.format(model=TINY)) / "model.gguf", Shape(context_length=4096))
    write_scripted(add_model(home, TALKER, CARD.format(model=TALKER)) / "model.gguf", CALL)
    with running(tree, home, PYTHON, TABLE) as client:
        for model in (TINY, TALKER):
            assert client.post("/place_instance", json={"model_id": model}).status_code == 200
        until(lambda: statuses(client) == ["RunnerReady"] * 2)
        yield client


def chat(node: httpx.Client, text: str = "hello", **fields: object) -> dict[str, Any]:
    return node.post("/v1/chat/completions", json=asked(text, **fields)).json()


def asked(text: str = "hello", **fields: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": TINY, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}


def chunks(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def text_of(chunk: dict[str, Any]) -> str:
    return next((each["delta"].get("content") or "" for each in chunk.get("choices", ())), "")


def test_the_card_decides_and_the_runner_s_probe_tells_what_there_is(node: httpx.Client) -> None:
    [backends] = state(node, "nodeBackends").values()
    assert backends == ["MlxCpu", "LlamaCppCpu"]
    assert {tag for each in state(node, "instances").values() for tag in each} == {"LlamaCppInstance"}
    previews = node.get("/instance/previews", params={"model_id": TINY}).json()["previews"]
    assert {tag for each in previews if each["instance"] for tag in each["instance"]} == {"LlamaCppInstance"}


def test_a_chat_is_answered_whole_and_as_a_stream(node: httpx.Client) -> None:
    whole = chat(node)
    assert whole["usage"]["completion_tokens"] == 8
    with node.stream("POST", "/v1/chat/completions", json=asked(stream=True)) as reply:
        streamed = list(chunks(reply))
    assert "".join(map(text_of, streamed)) == whole["choices"][0]["message"]["content"]


def test_a_benchmark_s_prompt_is_computed(node: httpx.Client) -> None:
    body = asked("word " * 100)
    for _ in range(2):
        stats = node.post("/bench/chat/completions", json=body).json()["generation_stats"]
        assert (stats["prefix_cache_hit"], stats["generation_tokens"]) == ("none", 8)
    cached = node.post("/bench/chat/completions", json={**body, "use_prefix_cache": True}).json()["generation_stats"]
    assert cached["prefix_cache_hit"] == "exact"


def test_a_tool_call_comes_whole(node: httpx.Client) -> None:
    function = {"name": "look", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
    reply = chat(node, model=TALKER, max_tokens=50, tools=[{"type": "function", "function": function}])
    [choice] = reply["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "look")
    assert json.loads(call["function"]["arguments"]) == {"place": "here"}


def test_a_prompt_that_is_too_long_fails_alone(node: httpx.Client) -> None:
    with node.stream("POST", "/bench/chat/completions", json=asked(stream=True, max_tokens=1500)) as reply:
        stream = chunks(reply)
        next(each for each in stream if text_of(each))
        # Upstream answers a whole request that fails with an empty body.
        refused = node.post("/v1/chat/completions", json=asked("word " * 1000, stream=True)).text
        assert "the context holds 2048" in refused
        rest = list(stream)
    assert sum(1 for each in rest if text_of(each)) > 100
    assert rest[-1]["choices"][0]["finish_reason"] == "length"


def test_a_client_that_leaves_frees_the_runner(node: httpx.Client) -> None:
    with node.stream("POST", "/bench/chat/completions", json=asked(stream=True, max_tokens=1500)) as reply:
        next(each for each in chunks(reply) if text_of(each))
    until(lambda: "RunnerRunning" not in statuses(node))
    ended = [each["TextGeneration"]["taskStatus"] for each in state(node, "tasks").values() if "TextGeneration" in each]
    assert not {"Pending", "Running"} & set(ended)
    assert chat(node)["usage"]["completion_tokens"] == 8


def test_models_whose_processes_are_killed_are_loaded_again(node: httpx.Client) -> None:
    with node.stream("POST", "/bench/chat/completions", json=asked(stream=True, max_tokens=1500)) as reply:
        stream = chunks(reply)
        next(each for each in stream if text_of(each))
        for each in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "exo.worker.runner_cuda" in each.cmdline():
                    each.kill()
        list(stream)
    until(lambda: statuses(node) == ["RunnerReady"] * 2)
    assert chat(node)["usage"]["completion_tokens"] == 8


def test_upstreams_own_tests_of_the_edited_files_pass(tree: Path, tmp_path: Path) -> None:
    folders = [str(tree / "exo" / name) for name in THEIR_TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--rootdir", str(tree), "-m", "not slow"]
    env = {**environment(tree, tmp_path, TABLE), "EXO_TESTS": "1", "HOME": str(tmp_path)}
    del env["EXO_HOME"], env["EXO_OFFLINE"]
    env["EXO_RESOURCES_DIR"] = str(Path(UPSTREAM).resolve() / "resources")
    command = [PYTHON, "-m", "pytest", *options, *folders]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
