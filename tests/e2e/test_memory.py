"""Runners that really run out of memory, under a limit of the kernel's so that nobody else does."""

import json
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, long_story, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.twins import FLOAT32, write_twins

LIMIT = 4 << 30
"""Bytes of address space for each process that the server starts."""
WIDE = Shape(layers=1, heads=8, kv_heads=8, head_dim=256)
"""16 KiB of KV cache for each token in float32, in one piece for the keys and one for the values."""
HUGE: dict[str, JsonValue] = {"n_ctx": 1 << 17, "slots": 4}
"""8 GiB of it, of which the first piece alone is beyond the limit."""
TOKENS = 1500
BODY = long_story(TOKENS)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    tables = write_twins(home, slots=2)
    write_gguf(home / "wide.gguf", WIDE)
    write_mlx(home / "wide", WIDE)
    write_card(home, "cuda", {"cuda": tables["cuda"]})
    write_card(home, "mlx", {"mlx": tables["mlx"]}, backends=["MlxCpu"])
    write_card(home, "huge", {"cuda": {"path": str(home / "wide.gguf"), **FLOAT32, **HUGE}})
    write_card(home, "huge-mlx", {"mlx": {"path": str(home / "wide"), "dtype": "float32", **HUGE}}, backends=["MlxCpu"])
    with ServeProgram(home) as server:
        psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_AS, (LIMIT, LIMIT))
        yield server


def row(server: ServeProgram, model: str) -> dict[str, Any]:
    (found,) = (each for each in server.client.get("/v1/instances").json()["data"] if each["model"] == f"test/{model}")
    return found


@pytest.fixture
def server(program: ServeProgram) -> Iterator[ServeProgram]:
    """The server, another model of which must not notice."""
    assert program.complete("cuda", max_tokens=1).status_code == 200
    before = row(program, "cuda")["pid"]
    yield program
    assert program.client.get("/health").json() == {"status": "ok"}
    assert program.complete("cuda", max_tokens=1).status_code == 200
    assert row(program, "cuda")["pid"] == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_kv_cache_that_does_not_fit_is_refused_in_words_and_in_bytes(server: ServeProgram, stream: bool) -> None:
    reply = server.complete("huge", stream=stream)
    if stream:  # on a slow machine the stream has begun before the load fails; the error is then its last event
        error = json.loads(reply.text.strip().rpartition("data: ")[2])["error"]
    else:
        assert reply.status_code == 503, reply.text
        assert reply.headers["x-should-retry"] == "false"
        error = reply.json()["error"]
    assert (error["code"], error["type"]) == ("out_of_memory", "server_error")
    assert "not enough memory" in error["message"]
    assert str(8 << 30) in error["message"]
    shown = row(server, "huge")
    assert (shown["state"], shown["last_failure"]["message"]) == ("Failed", error["message"])


def test_an_engine_that_crashes_where_memory_ends_is_given_up_after_a_few_tries(server: ServeProgram) -> None:
    """MLX does not look whether its allocator gave it anything."""
    reply = server.complete("huge-mlx")
    assert reply.status_code == 503, reply.text
    assert reply.json()["error"]["code"] in ("model_load_failed", "out_of_memory"), reply.text
    shown = row(server, "huge-mlx")
    assert shown["state"] == "Failed"
    assert 1 <= shown["deaths"] <= 4


@pytest.mark.parametrize("model", ["cuda", "mlx"])
def test_a_stream_goes_on_when_its_runner_runs_out_of_memory(program: ServeProgram, model: str) -> None:
    """A prompt that is larger than what the runner may still take ends it under the stream."""
    undisturbed = program.complete(model, **BODY).json()["choices"][0]["text"]
    deaths = row(program, model)["deaths"]
    pid = row(program, model)["pid"]
    with program.client.stream("POST", "/v1/completions", json={**BODY, "model": model, "stream": True}) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        before = [json.loads(next(lines)[6:]) for _ in range(5)]
        psutil.Process(pid).rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))  # it keeps what it has, and gets no more
        large = program.complete(model, prompt="x " * 200_000)
        *after, done = list(lines)
    assert done == "data: [DONE]"
    parts = (before, [json.loads(line[6:]) for line in after])
    texts = ["".join(chunk["choices"][0]["text"] for chunk in part) for part in parts]
    assert all(texts)
    assert "".join(texts) == undisturbed
    assert (large.status_code, large.json()["error"]["code"]) == (400, "context_length_exceeded")
    shown = row(program, model)
    assert shown["pid"] != pid
    assert shown["deaths"] == deaths + 1
    assert shown["last_failure"]["code"] == "out_of_memory"
    assert "this machine ran out of memory: fewer slots" in shown["last_failure"]["message"]
