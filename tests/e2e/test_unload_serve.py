"""Two real runners that do not fit together, behind a real server with a limit on memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx

LIMIT = 230_000_000
"""One of the models takes some 80 MB, the other 150."""
TABLE: dict[str, JsonValue] = {"threads": 1, "n_ctx": 1024, "prefix_cache_bytes": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    shape = Shape(heads=8, kv_heads=8, head_dim=64)
    write_gguf(home / "wide.gguf", shape)
    write_mlx(home / "tiny", Shape())
    write_card(home, "llama", {"cuda": {"path": str(home / "wide.gguf"), **TABLE, "slots": 16}})
    write_card(home, "mlx", {"mlx": {"path": str(home / "tiny"), "n_ctx": 1024}}, backends=["MlxCpu"])
    write_card(home, "huge", {"cuda": {"path": str(home / "wide.gguf"), **TABLE, "n_ctx": 1 << 20, "slots": 8}})
    table = {"path": str(home / "wide.gguf"), **TABLE, "n_ctx": "auto", "slots": 16}
    write_card(home, "open", {"cuda": {**table, "kv": "split"}})
    with ServeProgram(home, EXO_MEMORY_LIMIT=str(LIMIT)) as server:
        yield server


def row(server: ServeProgram, model: str) -> dict[str, Any] | None:
    rows = server.client.get("/v1/instances").json()["data"]
    return next((each for each in rows if each["model"] == f"test/{model}" and each["pid"] is not None), None)


def text(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def complete(server: ServeProgram, model: str) -> str:
    return text(server.complete(model, max_tokens=8, temperature=0, ignore_eos=True))


def test_swapping_two_models_under_alternating_requests_loses_none(server: ServeProgram) -> None:
    models = ["llama", "mlx"]
    first = {model: complete(server, model) for model in models}
    assert row(server, "llama") is None, "the first had to make room"
    for model in models:
        assert complete(server, model) == first[model]
    with ThreadPoolExecutor(8) as clients:
        asked = [models[number % 2] for number in range(8)]
        answers = list(clients.map(partial(complete, server), asked))
    assert answers == [first[model] for model in asked]


def test_what_an_instance_takes_is_told(server: ServeProgram) -> None:
    complete(server, "llama")
    shown = row(server, "llama")
    assert shown is not None
    assert 0 < shown["memory_reserved"] <= LIMIT
    assert shown["device_memory_reserved"] == 0
    assert (shown["pinned"], shown["expires_seconds"]) == (False, None)
    assert shown["tokens_per_second"] > 0


def test_what_cannot_fit_is_refused_with_both_numbers_and_a_way_out(server: ServeProgram) -> None:
    reply = server.complete("huge")
    assert reply.status_code == 503
    error = reply.json()["error"]
    assert error["code"] == "out_of_memory"
    assert f"at most {LIMIT:,} can be freed" in error["message"]
    assert "n_ctx = 512 and slots = 1" in error["message"]
    assert reply.headers["x-should-retry"] == "false"
    assert row(server, "huge") is None


def test_a_context_left_open_is_what_there_is_memory_for(server: ServeProgram) -> None:
    complete(server, "open")
    reply = server.complete("open", prompt=[1] * 5000, max_tokens=1)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    holds = int(message.split("maximum context length is ")[1].split()[0])
    assert 512 <= holds < 4096


def test_a_model_is_unloaded_and_loaded_again_when_it_is_needed(server: ServeProgram) -> None:
    before = complete(server, "mlx")
    assert row(server, "mlx") is not None
    reply = server.client.post("/v1/models/unload", json={"model": "mlx"})
    assert (reply.status_code, reply.json()) == (200, {"model": "mlx", "unloaded": True})
    assert row(server, "mlx") is None
    again = server.client.post("/v1/models/unload", json={"model": "mlx"})
    assert again.json() == {"model": "mlx", "unloaded": False}
    assert complete(server, "mlx") == before


def test_a_model_that_has_no_card_cannot_be_unloaded(server: ServeProgram) -> None:
    reply = server.client.post("/v1/models/unload", json={"model": "nonesuch"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert server.client.post("/v1/models/unload", json={}).status_code == 400
