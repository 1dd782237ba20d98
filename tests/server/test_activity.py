"""The last requests and their progress, as an operator sees them in ``/v1/activity`` and its events."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo.config import Access, ApiKey
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.server import DEADLINE_SECONDS

QUICK, SLOW, DYING, EMPTY = "fake/quick", "fake/slow", "fake/dying", "fake/empty"
BODY = {"model": QUICK, "prompt": "hi there", "max_tokens": 4, "temperature": 0}
ENDLESS = {"model": SLOW, "prompt": "hi", "max_tokens": 2000, "ignore_eos": True, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    cards = (
        fake_card(QUICK, chat_template=CHAT_TEMPLATE),
        fake_card(SLOW, slots=1, step_seconds=0.02),
        fake_card(DYING, die_after=5),
        fake_card(EMPTY, fail_load="it is empty"),
    )
    with serve(tmp_path_factory.mktemp("server"), *cards) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def record_of(http: httpx.Client, request: str) -> dict[str, Any] | None:
    """The record of a request that has this id."""
    found = [each for each in http.get("/v1/activity").json()["requests"] if each["id"] == request]
    return found[0] if found else None


def wait_for(http: httpx.Client, request: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The record once it is as it must become."""
    until = time.monotonic() + DEADLINE_SECONDS
    while True:
        record = record_of(http, request)
        if record is not None and holds(record):
            return record
        assert time.monotonic() < until, record
        time.sleep(0.01)


def ended(record: dict[str, Any]) -> bool:
    return record["phase"] in ("finished", "failed", "cancelled")


@contextmanager
def endless(http: httpx.Client, request: str) -> Generator[httpx.Response]:
    """A stream that ends when the client leaves."""
    with http.stream("POST", "/v1/completions", json=ENDLESS, headers={"x-request-id": request}) as reply:
        yield reply


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request(http: httpx.Client, stream: bool) -> None:
    name = f"finished-{stream}"
    headers = {"x-request-id": name, "user-agent": "agent/1.0 (any system)"}
    reply = http.post("/v1/completions", json={**BODY, "stream": stream}, headers=headers)
    record = wait_for(http, name, ended)
    assert record["client"] == "agent/1.0 127.0.0.1"
    assert (record["dialect"], record["path"]) == ("openai", "/v1/completions")
    assert (record["model"], record["runner"]) == (QUICK, "cuda")
    assert record["instance"].startswith("fake--quick@cuda-")
    assert record["route"] == reply.headers["x-exo-route"]
    assert (record["phase"], record["status"], record["error"]) == ("finished", 200, None)
    assert (record["prompt_tokens"], record["prefill_done"], record["completion_tokens"]) == (8, 8, 4)
    assert (record["finish_reason"], record["replays"]) == ("length", 0)
    assert 0 < record["first_token_s"] <= record["seconds"]
    assert record["queue_s"] + record["load_s"] <= record["seconds"]
    assert abs(record["started"] - time.time()) < DEADLINE_SECONDS


@pytest.mark.parametrize(
    ("path", "body", "dialect"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}, "openai"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}, "anthropic"),
        ("/api/generate", {"prompt": "hi", "options": {"num_predict": 2}, "stream": False}, "ollama"),
        ("/completion", {"prompt": "hi", "n_predict": 2}, "llama-server"),
    ],
)
def test_each_dialect(http: httpx.Client, path: str, body: dict[str, object], dialect: str) -> None:
    name = f"dialect-{path}"
    assert http.post(path, json={"model": QUICK, **body}, headers={"x-request-id": name}).status_code == 200
    record = wait_for(http, name, ended)
    assert (record["dialect"], record["path"], record["phase"]) == (dialect, path, "finished")
    assert record["completion_tokens"] == 2


def test_a_vector_of_a_text(http: httpx.Client) -> None:
    headers = {"x-request-id": "vector"}
    assert http.post("/v1/embeddings", json={"model": QUICK, "input": "hello"}, headers=headers).status_code == 200
    record = wait_for(http, "vector", ended)
    assert (record["phase"], record["prompt_tokens"], record["completion_tokens"]) == ("finished", 5, 0)


@pytest.mark.parametrize(
    ("body", "status", "error", "model"),
    [
        ({**BODY, "model": "nothing"}, 404, "model_not_found", ""),
        ({**BODY, "top_p": 7}, 400, "invalid_value", ""),
        ({**BODY, "prompt": "x" * 5000}, 400, "context_length_exceeded", QUICK),
        ({**BODY, "model": EMPTY}, 503, "model_load_failed", EMPTY),
    ],
)
def test_a_refused_request(http: httpx.Client, body: dict[str, object], status: int, error: str, model: str) -> None:
    name = f"refused-{error}"
    assert http.post("/v1/completions", json=body, headers={"x-request-id": name}).status_code == status
    record = wait_for(http, name, ended)
    assert (record["phase"], record["status"], record["error"]) == ("failed", status, error)
    assert (record["model"], record["completion_tokens"]) == (model, 0)


def test_a_request_that_waits_and_one_that_is_cut_off(http: httpx.Client) -> None:
    with ThreadPoolExecutor() as threads:
        with endless(http, "first"):
            first = wait_for(http, "first", lambda record: record["completion_tokens"] > 3)
            assert (first["phase"], first["status"]) == ("decode", 200)
            assert first["tokens_per_second"] > 0
            waiting: Future[httpx.Response] = threads.submit(
                http.post, "/v1/completions", json={**BODY, "model": SLOW}, headers={"x-request-id": "second"}
            )
            second = wait_for(http, "second", lambda record: record["prompt_tokens"] > 0)
            assert (second["phase"], second["status"], second["first_token_s"]) == ("queued", None, None)
            newest = [each["id"] for each in http.get("/v1/activity", params={"limit": 2}).json()["requests"]]
            assert newest == ["second", "first"]
        first = wait_for(http, "first", ended)
        assert (first["phase"], first["finish_reason"]) == ("cancelled", None)
        assert waiting.result().status_code == 200
        assert wait_for(http, "second", ended)["queue_s"] > 0


def test_a_model_that_loads(tmp_path: Path, gate: Path) -> None:
    card = fake_card(load_gate=str(gate))
    with serve(tmp_path, card) as url, httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor() as threads:
        body = {**BODY, "model": card.model_id}
        reply = threads.submit(http.post, "/v1/completions", json=body, headers={"x-request-id": "loads"})
        wait_for(http, "loads", lambda record: record["phase"] == "loading")
        gate.write_bytes(b"")
        assert reply.result().status_code == 200
        record = wait_for(http, "loads", ended)
        assert (record["phase"], record["load_s"] > 0) == ("finished", True)


def events_of(reply: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and data of a stream's events."""
    name = ""
    for line in reply.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def test_events_tell_of_a_request_that_loses_its_runner(http: httpx.Client) -> None:
    with http.stream("GET", "/v1/activity/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = events_of(stream)
        name, first = next(events)
        assert (name, first["object"]) == ("instances", "list")
        body = {**BODY, "model": DYING, "max_tokens": 12}
        headers = {"x-request-id": "replayed"}
        reply = httpx.post(f"{http.base_url}/v1/completions", json=body, headers=headers, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] == 12
        told: dict[str, list[dict[str, Any]]] = {"request": [], "instances": [], "death": [], "replay": []}
        over: list[dict[str, Any]] = []
        while not (over and told["death"] and told["replay"]):
            name, data = next(events)
            told[name].append(data)
            over += [data] if data.get("id") == "replayed" and ended(data) else []
    assert over[0]["phase"] == "finished"
    assert over[0]["replays"] >= 2
    replay = told["replay"][0]
    assert (replay["request"], replay["model"]) == ("replayed", DYING)
    assert replay["instance"].startswith("fake--dying@cuda-")
    assert 0 < replay["tokens"] <= 5
    death = told["death"][0]
    assert (death["model"], death["runner"], death["code"]) == (DYING, "cuda", "runner_died")
    assert "SIGKILL" in death["message"]


def test_a_late_listener_hears_of_requests_in_flight(http: httpx.Client) -> None:
    with endless(http, "early"):
        wait_for(http, "early", lambda record: record["completion_tokens"] > 0)
        with http.stream("GET", "/v1/activity/events") as stream:
            steps: list[int] = []
            for name, data in events_of(stream):
                if name == "request" and data["id"] == "early":
                    steps.append(data["completion_tokens"])
                if len(steps) == 3:
                    break
    assert steps == sorted(set(steps))


def test_a_listener_may_ask_for_fewer_messages(http: httpx.Client) -> None:
    with endless(http, "rarely"), http.stream("GET", "/v1/activity/events", params={"interval": 0.5}) as stream:
        events = (data for name, data in events_of(stream) if name == "request" and data["id"] == "rarely")
        told = [next(events) for _ in range(3)]
    assert all(after["seconds"] - before["seconds"] > 0.49 for before, after in pairwise(told))


@pytest.mark.parametrize("path", ["/v1/activity", "/v1/activity/events"])
def test_keys_guard_the_activity(tmp_path: Path, path: str) -> None:
    access = Access(keys=(ApiKey("me", "secret-key"), ApiKey("you", "other-key")))
    with serve(tmp_path, fake_card(QUICK), access=access) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert http.get(path).status_code == 401
        denied = http.post("/v1/completions", json=BODY, headers={"x-request-id": "denied"})
        assert denied.status_code == 401
        mine, yours = {"authorization": "Bearer secret-key"}, {"authorization": "Bearer other-key"}
        assert http.post("/v1/completions", json=BODY, headers={**mine, "x-request-id": "mine"}).status_code == 200
        requests = http.get("/v1/activity", headers=yours).json()["requests"]
        assert [each["id"] for each in requests] == ["mine"]


def test_what_a_client_says_of_itself_is_cut_and_escaped(http: httpx.Client) -> None:
    headers = {"x-request-id": "odd", "user-agent": "\x85" + "long" * 100 + " rest"}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    assert http.post("/v1/completions", json=BODY, headers=raw).status_code == 200
    client = wait_for(http, "odd", ended)["client"]
    assert len(client) < 120
    assert client.isprintable()


def test_the_head_of_the_stream_ends(http: httpx.Client) -> None:
    head = http.head("/v1/activity/events")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("path", "query"),
    [
        *(("/v1/activity", {"limit": limit}) for limit in ("0", "1001", "many")),
        *(("/v1/activity/events", {"interval": interval}) for interval in ("-1", "5.1", "nan", "often")),
    ],
)
def test_a_query_that_cannot_be(http: httpx.Client, path: str, query: dict[str, str]) -> None:
    reply = http.get(path, params=query)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(query)))
