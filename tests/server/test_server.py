"""What the server says about itself, and how it begins and ends."""

import socket
from collections.abc import Generator
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import JsonValue

from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.fake_runner import PROCESS_BYTES

MODEL = "fake/model"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture
def http(tmp_path: Path) -> Generator[httpx.Client]:
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE)
    with serve(tmp_path, card) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_health_is_the_process_and_ready_a_model(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    before = http.get("/ready")
    assert before.status_code == 503
    assert before.json()["error"]["code"] == "not_ready"
    assert before.json()["error"]["message"] == "no model can answer yet; none is being loaded"
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200
    after = http.get("/ready")
    assert (after.status_code, after.json()) == (200, {"status": "ready", "models": [MODEL], "notices": []})


def test_ready_tells_what_is_loading_and_what_could_not(tmp_path: Path, gate: Path) -> None:
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE, load_gate=str(gate))
    with serve(tmp_path, card, load=[MODEL, "fake/none"]) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/v1/route", params={"model": MODEL}).status_code == 200  # so the host has been probed
        before = http.get("/ready").json()["error"]["message"]
        assert before.startswith(f"no model can answer yet; {MODEL} is ")
        assert "fake/none could not be loaded: no model card is called 'fake/none'" in before
        gate.open("wb").close()
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200
        assert http.get("/ready").json()["models"] == [MODEL]


def test_the_route_can_be_asked_for_without_running_anything(http: httpx.Client) -> None:
    report: dict[str, JsonValue] = {
        "model": MODEL,
        "runner": "cuda",
        "instance": None,
        "backend": "LlamaCppCpu",
        "host": "",
        "reason": "card prefers LlamaCppCpu, which is available",
        "speeds": [],
    }
    assert http.get("/v1/route", params={"model": MODEL, "plan": False}).json() == {**report, "plan": None}
    told = http.get("/v1/route", params={"model": MODEL}).json()
    assert told["plan"]["memory"] == {"memory": PROCESS_BYTES}
    assert told == {**report, "plan": told["plan"]}
    assert http.get("/ready").status_code == 503
    http.post("/v1/chat/completions", json=ASK)
    assert http.get("/v1/route", params={"model": MODEL}).json()["instance"] is not None
    (instance,) = http.get("/v1/instances").json()["data"]
    assert instance["plan"] == http.get("/v1/route", params={"model": MODEL}).json()["plan"] == told["plan"]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ({}, 400, "missing_parameter"),
        ({"model": ""}, 400, "invalid_value"),
        ({"model": "fake/none"}, 404, "model_not_found"),
        ({"model": f"{MODEL}@none"}, 400, "runner_not_found"),
    ],
)
def test_a_route_that_is_refused(http: httpx.Client, query: dict[str, str], status: int, code: str) -> None:
    reply = http.get("/v1/route", params=query)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, "model")


def test_a_card_that_nothing_here_can_serve(tmp_path: Path) -> None:
    card = fake_card(MODEL).model_copy(update={"backends": ("LlamaCppCuda",)})
    with serve(tmp_path, card) as url:
        refused = httpx.get(f"{url}/v1/route", params={"model": MODEL}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "runner_unavailable")
        refused = httpx.get(f"{url}/v1/route", params={"model": f"{MODEL}@cuda"}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "runner_unavailable")


def test_models(http: httpx.Client) -> None:
    model = http.get(f"/v1/models/{MODEL}").json()
    assert http.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert {"id", "object", "created", "owned_by", "status", "meta"} <= set(model)
    assert http.get("/v1/models/fake%2Fmodel").json() == model
    missing = http.get("/v1/models/fake/modle")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert "did you mean fake/model?" in missing.json()["error"]["message"]


def test_the_document_describes_what_the_endpoints_take(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert {"model", "messages", "temperature", "stop"} <= set(schema["properties"])
    assert schema["required"] == ["messages"]
    assert http.get("/docs").status_code == 200


def test_stopping_ends_every_process_it_started(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with serve(tmp_path, fake_card(MODEL, chat_template=CHAT_TEMPLATE)) as url:
        assert httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=60).status_code == 200
        started = set(psutil.Process().children(recursive=True)) - before
        assert len(started) == 2  # the runner and the template worker
    assert not [process for process in started if process.is_running()]
    with pytest.raises(ConnectionError), socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)):
        pass
