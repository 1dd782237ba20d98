"""The demo model, as ``make run`` serves it."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from exo.config import Settings
from tests.support.server import ServeProgram

MODEL = "gemma-3-270m"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    models = Settings.load().models_directory
    assert (models / "google--gemma-3-270m").is_dir(), "make demo-model fetches the demo model"
    with ServeProgram(tmp_path_factory.mktemp("home"), "--models-dir", str(models), "--load", MODEL) as program:
        yield program


def events(server: ServeProgram, path: str, body: Mapping[str, object]) -> list[Any]:
    """The JSON events of a stream; what follows the last one must be [DONE]."""
    request = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **body}
    with server.client.stream("POST", path, json=request) as reply:
        assert reply.status_code == 200
        data = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def test_it_answers_a_question(server: ServeProgram) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chunks = events(
        server, "/v1/chat/completions", {"messages": question, "max_tokens": 48, "temperature": 0, "stop": ["\nUser:"]}
    )
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert "Paris" in text
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"


def test_sixteen_streams_all_finish_with_exact_usage(server: ServeProgram) -> None:
    def stream(number: int) -> dict[str, int]:
        body = {"prompt": f"Story number {number}: once upon a time", "max_tokens": 16, "ignore_eos": True}
        chunks = events(server, "/v1/completions", body)
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "length"
        return chunks[-1]["usage"]

    with ThreadPoolExecutor(16) as pool:
        usages = list(pool.map(stream, range(16)))
    assert [usage["completion_tokens"] for usage in usages] == [16] * 16
    assert all(usage["prompt_tokens"] + 16 == usage["total_tokens"] for usage in usages)
    assert all(usage["prompt_tokens"] == 9 + len(str(number)) for number, usage in enumerate(usages))


def test_a_client_that_leaves_during_a_long_prompt_leaves_nothing_running(server: ServeProgram, tmp_path: Path) -> None:
    """The prompt needs seconds here; all slots are given back, so that others find room at once."""
    prompt = "word " * 2000
    for _ in range(2):
        for number in range(8):
            body = {"model": MODEL, "prompt": f"{number} {prompt}", "stream": True}
            with server.client.stream("POST", "/v1/completions", json=body) as reply:
                assert reply.status_code == 200
    assert len(events(server, "/v1/completions", {"prompt": "The", "max_tokens": 2, "ignore_eos": True})) >= 2


def test_text_in_many_scripts_arrives_whole(server: ServeProgram) -> None:
    words = "naïve café — 東京 😀 Ελλάδα"
    body = {"prompt": f"{words}\n" * 8, "max_tokens": 24, "temperature": 0}
    chunks = events(server, "/v1/completions", body)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert words in text
    assert "\ufffd" not in text
