"""Other people's programs against ``exo serve`` with llama.cpp; each is a script of ``tests/e2e/clients``.

They run in an environment of their own, since they need other versions of some packages than exo does.
"""

import json
import os
import subprocess
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import RUNNERS
from exo.worker.protocol.score import Score, Scored
from tests import ROOT
from tests.support.program import runner_command
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx, write_scripted
from tests.support.tiny.tool_template import TEMPLATE
from tests.support.twins import FLOAT32

PROGRAMS = Path(__file__).parent / "clients"
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
CALL = ("<tool_call>\n", '{"name": "paint", ', '"arguments": {"colour": "red"}}', "\n</tool_call>")
PAIRS = [("The sky is", " blue and wide"), ("hello world", " you and a user"), ("", "the assistant"), ("a b c", " d")]
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["red", "blue"]
metric_list:
  - metric: acc
"""


@dataclass(frozen=True, slots=True)
class Home:
    """A server, and the directory that its models are in."""

    server: ServeProgram
    directory: Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Generator[Home]:
    directory = tmp_path_factory.mktemp("home")
    write_gguf(directory / "tiny.gguf", Shape(scale=0.5))
    write_mlx(directory / "tokenizer", Shape(scale=0.5))
    write_scripted(directory / "calls.gguf", CALL)
    for name in ("tiny", "calls"):
        table: dict[str, JsonValue] = {"path": str(directory / f"{name}.gguf"), "n_ctx": 2048, "slots": 4, **FLOAT32}
        write_card(directory, name, {"cuda": {**table, "chat_template": TEMPLATE}}, backends=["LlamaCppCpu"])
    with ServeProgram(directory) as server:
        yield Home(server, directory)


def run(script: str, *arguments: str | Path, home: str | Path = "/nonexistent") -> None:
    assert PYTHON.exists(), "run `make setup-clients` first"
    # Nothing of the environment but what finds programs: keys and settings of whoever runs the tests are not for these.
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [PYTHON, PROGRAMS / script, *arguments],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("script", "model"), [("with_langchain.py", "tiny"), ("with_litellm.py", "tiny"), ("with_llm.py", "calls")]
)
def test_a_chat_a_stream_and_a_call(home: Home, script: str, model: str) -> None:
    run(script, home.server.url, model)


def test_lm_evaluation_harness_scores_as_teacher_forcing_does(home: Home, tmp_path: Path) -> None:
    questions = [(f"colour {number}:", number % 2) for number in range(10)]
    data = tmp_path / "colours.json"
    data.write_text("\n".join(json.dumps({"question": text, "answer": right}) for text, right in questions))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=data))
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    output = tmp_path / "out.json"
    run("with_lm_eval.py", home.server.url, "tiny", home.directory / "tokenizer", tmp_path, output, home=tmp_path)
    result = json.loads(output.read_text())

    choices = [(text, colour) for text, _ in questions for colour in (" red", " blue")]
    scores = forced(home, tmp_path, [*PAIRS, *choices])
    assert result["loglikelihoods"] == pytest.approx(scores[: len(PAIRS)], abs=1e-3)
    chosen = scores[len(PAIRS) :]
    guesses = [blue > red for red, blue in zip(chosen[::2], chosen[1::2], strict=True)]
    right = sum(guess == answer for guess, (_, answer) in zip(guesses, questions, strict=True))
    assert result["accuracy"] == pytest.approx(right / len(questions))


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    run("with_grafana.py", ROOT / "docs" / "grafana.json")


def forced(home: Home, directory: Path, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The log-probability of each context's continuation, by the runner's own ``--score``, as for ``exo compare``."""

    def tokens(text: str) -> list[int]:
        return home.server.client.post("/tokenize", json={"model": "tiny", "content": text}).json()["tokens"]

    # As lm-evaluation-harness cuts texts: an empty context is the end-of-turn token, spaces go to the continuation.
    texts = tuple(tuple(tokens((context or "<|im_end|>") + continuation)) for context, continuation in pairs)
    begins = [len(tokens(context)) if context else 1 for context, _ in pairs]
    table: dict[str, JsonValue] = {"path": str(home.directory / "tiny.gguf"), "n_ctx": 256, **FLOAT32}
    load = Load(model_id="test/tiny", backend="LlamaCppCpu", table=table)
    request = Score(load=load, prompts=texts, directory=str(directory))
    command = [*runner_command(RUNNERS["cuda"].module), "--score"]
    done = subprocess.run(command, input=request.model_dump_json().encode(), stdout=subprocess.PIPE, check=True)
    assert Scored.model_validate_json(done.stdout).tokens == texts
    scores: list[float] = []
    for number, (whole, begin) in enumerate(zip(texts, begins, strict=True)):
        rows = np.load(directory / f"{number}.npy")
        scores.append(float(sum(rows[at - 1, whole[at]] for at in range(begin, len(whole)))))
    return scores
