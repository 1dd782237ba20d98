"""Requests made from the server's own OpenAPI document, sound and spoiled: no 5xx, no dead runner, no lost slot.

schemathesis makes them for every route, against the fake runner. Our own generator makes those that it does not, for
the routes that generate, against llama.cpp: bodies with several things wrong at once, at any depth, and with numbers
that are none. A suite's run makes some hundreds of them; ``--hypothesis-profile=campaign`` makes thousands.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from pydantic import JsonValue
from schemathesis import GenerationMode

from tests.support.schema import accepted, spoiled
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf

MODELS = st.sampled_from(["good", "test/good", "good@cuda", "good@mlx", "good@", "bad"])
ROUTES = ("/v1/chat/completions", "/v1/completions")
HEALTH = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
    HealthCheck.function_scoped_fixture,
]
SLOTS = 4
SEED = 20261122


@contextmanager
def unharmed(server: ServeProgram) -> Generator[ServeProgram]:
    """The server, which must have the same runner at the end, and all of its slots free."""
    assert server.complete("good", max_tokens=1).status_code == 200
    (before,) = instances(server)
    yield server
    (after,) = instances(server)
    assert (after["pid"], after["deaths"], after["active"], after["waiting"]) == (before["pid"], 0, 0, 0)
    took_turns = False
    begun: set[int] = set()
    body = {"model": "good", "prompt": "x", "stream": True, "ignore_eos": True, "n": SLOTS}
    with server.client.stream("POST", "/v1/completions", json=body) as reply:
        for line in reply.iter_lines():
            for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                took_turns |= choice["finish_reason"] is not None and len(begun) < SLOTS
                begun.add(choice["index"])
    assert begun == set(range(SLOTS))
    assert not took_turns  # as they would with a slot less


def instances(server: ServeProgram) -> list[dict[str, Any]]:
    return server.client.get("/v1/instances").json()["data"]


def check(status: int, content: bytes, *, whole: bool = True) -> None:
    """Checks a reply in any dialect. The client left a stream that is not ``whole`` before its end."""
    text = content.decode()
    event(f"status {status}")
    assert status < 500, text
    if status >= 400:
        error = json.loads(text)["error"]
        assert error if isinstance(error, str) else error["message"]
        return
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith(("data: ", "{", "["))]
    if whole and text.startswith(("data: ", ": ")) and "event: " not in text:
        assert lines[-1] == "[DONE]" or json.loads(lines[-1])["stop"]  # llama-server's streams have no "[DONE]"
    lines = [line for line in lines if line != "[DONE]"]
    assert lines
    assert not any(map(is_error, lines))


def is_error(line: str) -> bool:
    made: JsonValue = json.loads(line)
    return isinstance(made, dict) and bool(made.get("error"))


def for_this_server(body: JsonValue, model: str) -> None:
    """Gives a body, where it is one, a model that there is, and few tokens, so that a campaign takes minutes."""
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(limit := body.get(name), int):
            body[name] = min(limit, 8)
    body.setdefault("max_tokens", 4)
    if "model" in body:
        body["model"] = model


# --- schemathesis ---


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("fake")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    table: dict[str, JsonValue] = {"slots": SLOTS, "n_ctx": 512, "chat_template": template}
    write_card(home, "good", {"cuda": table}, backends=["LlamaCppCpu"])
    with ServeProgram(home, fake=True) as program, unharmed(program) as server:
        yield server


Cases = st.SearchStrategy[Any]
"""Of ``schemathesis.Case``, whose own types are incomplete."""


@pytest.fixture(scope="module")
def cases(fake: ServeProgram) -> Cases:
    """For every operation of the document: what it takes and, where anything can be wrong with it, what it does not."""
    document: Any = schemathesis.openapi.from_dict(fake.client.get("/openapi.json").json())
    made: list[Cases] = []
    for found in document.get_all_operations():
        operation = found.ok()
        # Streams without an end, and replies that are no object.
        if operation.path in ("/v1/activity/events", "/instance/await", "/metrics", "/node_id"):
            continue
        made.append(operation.as_strategy(GenerationMode.POSITIVE))
        if operation.body or operation.query:
            made.append(operation.as_strategy(GenerationMode.NEGATIVE))
    return st.one_of(made)


@seed(SEED)
@settings(suppress_health_check=HEALTH)
@given(data=st.data(), model=MODELS | st.none())
def test_nothing_that_schemathesis_thinks_of_is_the_servers_fault(
    fake: ServeProgram, cases: Cases, data: st.DataObject, model: str | None
) -> None:
    case = data.draw(cases)
    if model is not None:
        for_this_server(case.body, model)
    event(case.operation.label)
    reply = case.call(base_url=fake.url)
    check(reply.status_code, reply.content, whole=not reply.stream_cut_short)


# --- our own ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "good.gguf", Shape())
    table: dict[str, JsonValue] = {"slots": SLOTS, "n_ctx": 512, "threads": 1, "path": str(home / "good.gguf")}
    write_card(home, "good", {"cuda": table})
    with ServeProgram(home) as program, unharmed(program) as server:
        yield server


@pytest.fixture(scope="module")
def bodies(server: ServeProgram) -> dict[str, st.SearchStrategy[JsonValue]]:
    """By route."""
    document = server.client.get("/openapi.json").json()
    return {route: body_of(document, route) for route in ROUTES}


def body_of(document: dict[str, Any], route: str) -> st.SearchStrategy[JsonValue]:
    schema = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    sound = accepted(schema, document["components"]["schemas"])
    return spoiled(st.tuples(sound, MODELS).map(_with_model))


def _with_model(made: tuple[JsonValue, str]) -> JsonValue:
    for_this_server(*made)
    return made[0]


@pytest.mark.parametrize("route", ROUTES)
@seed(SEED)
@settings(suppress_health_check=HEALTH)
@given(data=st.data())
def test_no_body_is_the_servers_fault(
    server: ServeProgram, bodies: dict[str, st.SearchStrategy[JsonValue]], route: str, data: st.DataObject
) -> None:
    body = json.dumps(data.draw(bodies[route]))  # which writes NaN and Infinity, as no JSON library should
    reply = server.client.post(route, content=body, headers={"content-type": "application/json"})
    check(reply.status_code, reply.content)


@seed(SEED)
@settings(suppress_health_check=HEALTH)
@given(name=st.text(st.characters(codec="utf-8"), max_size=40) | MODELS)
def test_no_name_is_the_servers_fault(server: ServeProgram, name: str) -> None:
    for reply in (
        server.client.get("/v1/route", params={"model": name}),
        server.client.get(f"/v1/models/{quote(name, safe='')}"),
    ):
        check(reply.status_code, reply.content)
