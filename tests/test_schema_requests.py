"""Requests made from the server's own OpenAPI document, sound and spoiled: no 5xx, no dead runner, no lost slot.

A suite's run makes some hundreds of them; ``--hypothesis-profile=campaign`` makes thousands.
"""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from tests.schema import accepted, spoiled
from tests.server import ServeProgram, write_card
from tests.tiny import Shape, write_gguf

MODELS = st.sampled_from(["good", "test/good", "good@cuda", "good@mlx", "good@", "bad"])
ROUTES = ("/v1/chat/completions", "/v1/completions")
HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
TABLE: dict[str, JsonValue] = {"slots": 4, "n_ctx": 256, "threads": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "good.gguf", Shape())
    write_card(home, "good", {"cuda": {**TABLE, "path": str(home / "good.gguf")}})
    with ServeProgram(home, "--load", "good") as program:
        assert program.complete("good", max_tokens=1).status_code == 200
        runners = [runner.pid for runner in program.runners()]
        yield program
        assert [runner.pid for runner in program.runners()] == runners
        streams = [
            program.client.stream("POST", "/v1/completions", json={"model": "good", "prompt": "x", "stream": True})
            for _ in range(4)
        ]
        for stream in streams:
            with stream as reply:
                assert "[DONE]" in reply.read().decode()


@pytest.fixture(scope="module")
def bodies(server: ServeProgram) -> dict[str, st.SearchStrategy[JsonValue]]:
    """By route."""
    document = server.client.get("/openapi.json").json()
    return {route: body_of(document, route) for route in ROUTES}


def body_of(document: dict[str, Any], route: str) -> st.SearchStrategy[JsonValue]:
    schema = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    sound = accepted(schema, document["components"]["schemas"])
    return spoiled(st.tuples(sound, MODELS).map(_for_this_server))


def _for_this_server(made: tuple[JsonValue, str]) -> JsonValue:
    """With a model that there is, and few tokens, so that a campaign takes minutes."""
    body, model = made
    assert isinstance(body, dict)
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(limit := body.get(name), int):
            body[name] = min(limit, 8)
    return {"max_tokens": 4, **body, "model": model}


def check(reply: httpx.Response) -> None:
    event(f"status {reply.status_code}")
    assert reply.status_code < 500, reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        lines = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", lines[-1]
        assert not any("error" in json.loads(line) for line in lines[:-1])
    elif reply.status_code >= 400:
        assert list(reply.json()) == ["error"]
        assert reply.json()["error"]["message"]
    else:
        assert reply.json()


@pytest.mark.parametrize("route", ROUTES)
@settings(deadline=None, suppress_health_check=HEALTH)
@given(data=st.data())
def test_no_body_is_the_servers_fault(
    server: ServeProgram, bodies: dict[str, st.SearchStrategy[JsonValue]], route: str, data: st.DataObject
) -> None:
    body = json.dumps(data.draw(bodies[route]))  # which writes NaN and Infinity, as no JSON library should
    check(server.client.post(route, content=body, headers={"content-type": "application/json"}))


@settings(deadline=None, suppress_health_check=HEALTH)
@given(name=st.text(st.characters(codec="utf-8"), max_size=40) | MODELS)
def test_no_name_is_the_servers_fault(server: ServeProgram, name: str) -> None:
    check(server.client.get("/v1/route", params={"model": name}))
    check(server.client.get(f"/v1/models/{quote(name, safe='')}"))
