"""The examples of docs/api.md, run as they stand against a real server; and its tables against the OpenAPI document.

The model that they name is a tiny one here, by an alias of its card.
"""

import gc
import os
import re
import subprocess
from collections.abc import Generator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any
from warnings import catch_warnings

import pytest
from pydantic import JsonValue

from tests import ROOT
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.encoder import Encoder
from tests.support.tiny.filling import write_filling
from tests.support.tiny.tool_template import TEMPLATE

DOCUMENT = (ROOT / "docs" / "api.md").read_text()
FIELD = re.compile(r"`([a-z_]+)`")


@dataclass(frozen=True, slots=True)
class Example:
    """A fenced block, under the last heading before it."""

    heading: str
    language: str
    text: str


def examples() -> list[Example]:
    found: list[Example] = []
    heading = ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        elif match[2] != "text":
            found.append(Example(heading, match[2], match[3]))
    return found


PRINTS: dict[tuple[str, str], str] = {
    ("Errors", "bash"): r'greater than or equal to 0.*"param":"temperature"',
    ("Errors", "python"): r"top_p invalid_value .*less than or equal to 1",
    ("POST /v1/chat/completions", "bash"): r'"object":"chat.completion".*"finish_reason":"(stop|length)"',
    ("POST /v1/chat/completions", "python"): r"completion_tokens=|\{'colour': .*\npaint \{'colour': ",
    ("POST /v1/completions", "bash"): r'"text_completion".*"index":1',
    ("POST /v1/completions", "python"): r"^\['.*'\] \[None, -",
    ("POST /v1/embeddings", "bash"): r'"index":1,"embedding":\[-?[0-9]',
    ("POST /v1/embeddings", "python"): r"^64 [1-9]",
    (
        "GET /props and GET /slots",
        "bash",
    ): r'"total_slots":[1-9].*\[\{"id":0,"id_task":|"n_ctx":[1-9].*"is_processing":false',
    ("POST /embedding", "bash"): r'\[\{"index":0,"embedding":\[\[-?[0-9]',
    ("POST /v1/responses", "bash"): r'"object":"response".*"type":"output_text"',
    ("POST /v1/responses", "python"): r"(completed|incomplete)\n$",
    ("GET /v1/models", "bash"): r'"id":"test/tiny","object":"model"',
    ("GET /v1/models", "python"): r"'test/tiny'",
    ("POST /v1/messages", "bash"): r'"type":"message".*"stop_reason":"(end_turn|max_tokens)"',
    ("POST /v1/messages", "python"): r"(end_turn|max_tokens)\n$",
    ("POST /v1/messages/count_tokens", "bash"): r'\{"input_tokens":[1-9]',
    ("POST /v1/messages/count_tokens", "python"): r"^[1-9]",
    ("POST /api/chat", "bash"): r'"role":"assistant","content":"[^"].*"done":true',
    ("POST /api/chat", "python"): r".",
    ("POST /api/generate", "bash"): r'"response":"[^"].*"done":true',
    ("POST /api/generate", "python"): r'^"(red|blue)"\n$',
    ("POST /api/embed", "bash"): r'"embeddings":\[\[-?[0-9]',
    ("POST /api/embed", "python"): r"^16\n$",
    ("GET /api/tags and POST /api/show", "bash"): r'"name":"test/tiny".*"capabilities":\["completion"',
    ("GET /api/tags and POST /api/show", "python"): r"'test/tiny'.*\n\['completion'",
    ("POST /completion", "bash"): r'"content":"[^"].*"stop_type":"(eos|limit)".*"completion_probabilities":\[\{"id":',
    ("POST /infill", "bash"): r'"content":"[^"].*"tokens_evaluated":[1-9]',
    ("POST /tokenize and POST /detokenize", "bash"): r'"piece":"O.*\{"content":"On"\}',
    ("POST /apply-template", "bash"): r"user\\nhi",
    ("POST /v1/rerank", "bash"): r'"results":\[\{"index":[01],"relevance_score":-?[0-9.e-]+\}\]',
    ("POST /v1/score", "bash"): r'"data":\[\{"index":0,"object":"score","score":-?[0-9.e-]+\},\{"index":1',
    ("GET /instance/previews and POST /place_instance", "bash"): (
        r'"instance_meta":"MlxRing".*"Command received.".*"type":"ready".*"Runner(Ready|Running)"'
    ),
    ("The server itself", "bash"): r'"status":"ok".*"status":"ready".*"state":"R.*"reason":"card prefers',
    ("The server itself", "python"): r"test/tiny cuda R.*of 4 slots busy",
}
"""What an example must print, by its heading and language."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "tiny.gguf", Shape(scale=0.5))
    Encoder("rank").write(home / "ranker.gguf")
    table: dict[str, JsonValue] = {"path": str(home / "tiny.gguf"), "n_ctx": 512, "slots": 4, "threads": 1}
    cuda: dict[str, JsonValue] = {**table, "chat_template": TEMPLATE}
    greedy: dict[str, JsonValue] = {"temperature": 0}
    tables = {"cuda": cuda, "sampling_defaults": greedy}
    write_card(home, "tiny", tables, backends=["LlamaCppCpu"], aliases=["gemma-3-270m"])
    ranker: dict[str, JsonValue] = {"path": str(home / "ranker.gguf"), "threads": 1}
    write_filling(home / "coder.gguf")
    coder: dict[str, JsonValue] = {"path": str(home / "coder.gguf"), "threads": 1}
    write_card(home, "coder", {"cuda": coder}, backends=["LlamaCppCpu"], aliases=["my-coder"])
    write_card(
        home, "ranker", {"cuda": ranker}, backends=["LlamaCppCpu"], aliases=["my-reranker"], tasks=["TextRanking"]
    )
    with ServeProgram(home) as program:
        assert program.complete("gemma-3-270m", max_tokens=1).status_code == 200
        yield program


@pytest.mark.parametrize("example", examples(), ids=lambda each: f"{each.heading}, {each.language}")
def test_an_example(server: ServeProgram, monkeypatch: pytest.MonkeyPatch, example: Example) -> None:
    monkeypatch.setenv("EXO_URL", server.url)
    printed = run_bash(example.text) if example.language == "bash" else run_python(example.text)
    expected = PRINTS[example.heading, example.language]
    assert re.search(expected, printed, re.DOTALL), printed
    assert ('"error":{' in printed) == (example.heading == "Errors" and example.language == "bash"), printed


def run_bash(text: str) -> str:
    command = ["bash", "-euc", text]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True, timeout=60).stdout


def run_python(text: str) -> str:
    """In this process, since starting another for each costs more than all else."""
    printed = StringIO()
    with redirect_stdout(printed), catch_warnings(action="ignore", category=ResourceWarning):
        exec(compile(text, "docs/api.md", "exec"), {"__name__": "__main__"})
        gc.collect()  # a program's connections end with it
    return printed.getvalue()


def test_every_expectation_is_of_an_example() -> None:
    assert {(each.heading, each.language) for each in examples()} == PRINTS.keys()


def test_every_path_is_told_of(server: ServeProgram) -> None:
    paths: list[str] = list(server.client.get("/openapi.json").json()["paths"])
    assert len(paths) > 20
    assert [path for path in paths if path.partition("/{")[0] not in DOCUMENT] == []


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/api/chat"]
)
def test_a_table_has_all_the_fields_there_are_and_no_others(server: ServeProgram, path: str) -> None:
    document: dict[str, Any] = server.client.get("/openapi.json").json()
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties: dict[str, Any] = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    there = properties.keys() - {"model"}
    told = fields_of(path)
    if path == "/v1/completions":
        told |= fields_of("/v1/chat/completions") & there
    assert told == there


def fields_of(path: str) -> set[str]:
    """Those in the first column of the tables under a path's heading."""
    section = DOCUMENT.partition(f"### POST {path}\n")[2].partition("\n### ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {field for row in rows for field in FIELD.findall(row)}
