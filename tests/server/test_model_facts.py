"""What clients learn of models before they send a request: lists, properties, slots, and paths of other servers."""

import json
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import ollama
import openai
import pytest

from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

TOOLS_TEMPLATE = CHAT_TEMPLATE + "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}"
LOADED, STATED, OPEN = "fake/loaded", "fake/stated", "fake/open"
ENDLESS = {"model": LOADED, "prompt": "hi", "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    trained = {"context_length": 262_144, "capabilities": ("thinking",)}
    cards = (
        fake_card(LOADED, chat_template=TOOLS_TEMPLATE, n_ctx=2048, slots=3, step_seconds=0.005).model_copy(
            update=trained
        ),
        fake_card(STATED, n_ctx=1024).model_copy(update=trained),
        fake_card(OPEN, n_ctx="auto").model_copy(update=trained),
    )
    with serve(tmp_path_factory.mktemp("server"), *cards) as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"model": LOADED, "prompt": "hi", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200
        yield client


def listed(http: httpx.Client, **query: str) -> dict[str, dict[str, object]]:
    return {model["id"]: model for model in http.get("/v1/models", params=query).json()["data"]}


def test_a_loaded_model_tells_what_a_request_may_use(http: httpx.Client) -> None:
    model = http.get(f"/v1/models/{LOADED}").json()
    assert listed(http)[LOADED] == model
    assert (model["context_length"], model["max_model_len"]) == (2048, 2048)
    assert model["meta"] == {"n_ctx": 2048, "n_ctx_train": 262_144, "n_vocab": 258, "size": model["meta"]["size"]}
    assert model["status"] == {"value": "loaded"}
    assert model["capabilities"] == ["completion", "tools", "thinking"]
    assert model["architecture"]["input_modalities"] == ["text"]
    assert {"tools", "tool_choice", "temperature", "max_tokens", "reasoning"} <= set(model["supported_parameters"])
    longest = http.post("/v1/completions", json={"model": LOADED, "prompt": [97] * 2047, "max_tokens": 1})
    assert longest.status_code == 200


def test_a_model_that_is_not_loaded_tells_its_cards_context_and_never_the_trained_one(http: httpx.Client) -> None:
    stated, undecided = http.get(f"/v1/models/{STATED}").json(), http.get(f"/v1/models/{OPEN}").json()
    assert (stated["context_length"], stated["status"]) == (1024, {"value": "unloaded"})
    assert not {"context_length", "max_model_len"} & set(undecided)
    assert undecided["meta"] == {"n_ctx_train": 262_144, "size": 1}
    assert "tools" not in stated["supported_parameters"]


def test_ollamas_clients_learn_the_same_length(http: httpx.Client) -> None:
    with closing(ollama.Client(host=str(http.base_url))) as client:
        for name, length in ((LOADED, 2048), (STATED, 1024)):
            info = client.show(name).modelinfo
            assert info is not None
            (told,) = [value for key, value in info.items() if key.endswith(".context_length")]
            assert told == length
        (running,) = client.ps().models
        assert (running.model, running.context_length) == (LOADED, 2048)


def test_the_list_can_be_narrowed(http: httpx.Client) -> None:
    assert set(listed(http, status="loaded")) == {LOADED}
    assert set(listed(http, status="downloaded")) == {LOADED, STATED, OPEN}
    assert http.get("/v1/models", params={"status": "nonsense"}).json()["error"]["param"] == "status"


def test_properties_and_slots(http: httpx.Client) -> None:
    props = http.get("/props").json()  # of the only loaded model
    assert (props["model_alias"], props["default_generation_settings"], props["total_slots"]) == (
        LOADED,
        {"n_ctx": 2048},
        3,
    )
    assert props["chat_template"] == TOOLS_TEMPLATE
    assert props["modalities"] == {"vision": False, "audio": False}
    assert http.get("/props", params={"model": STATED}).json()["default_generation_settings"] == {"n_ctx": 1024}
    assert http.get("/props", params={"model": "none"}).status_code == 404
    slots = http.get("/slots").json()
    assert [(slot["id"], slot["n_ctx"], slot["model"]) for slot in slots] == [(at, 2048, LOADED) for at in range(3)]
    assert not any(slot["is_processing"] for slot in slots)
    with http.stream("POST", "/v1/completions", json=ENDLESS) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert [slot["is_processing"] for slot in http.get("/slots").json()] == [True, False, False]


CHAT = {"model": LOADED, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
OLLAMA_CHAT = {"model": LOADED, "messages": CHAT["messages"], "options": {"num_predict": 2}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", CHAT),
        ("/completions", {"model": LOADED, "prompt": "hi", "max_tokens": 2}),
        ("/embeddings", {"model": LOADED, "input": "hi"}),
        ("/responses", {"model": LOADED, "input": "hi", "max_output_tokens": 2}),
        ("/messages", CHAT),
        ("/ollama/v1/chat/completions", CHAT),
        ("/ollama/api/chat", OLLAMA_CHAT),
        ("/ollama/api/api/chat", OLLAMA_CHAT),
        ("/ollama/api/show", {"model": LOADED}),
    ],
)
def test_paths_without_v1_and_below_ollama(http: httpx.Client, path: str, body: dict[str, object]) -> None:
    assert http.post(path, json=body).status_code == 200
    missing = http.post(path, json={**body, "model": "none"})
    assert missing.status_code == 404
    assert missing.json() == http.post(path.replace("/ollama/api/api", "/api"), json={**body, "model": "none"}).json()


def test_lists_without_v1_and_below_ollama(http: httpx.Client) -> None:
    assert http.get("/models").json() == http.get("/v1/models").json()
    assert http.get(f"/models/{LOADED}").json()["id"] == LOADED
    assert http.get("/ollama/api/tags").json() == http.get("/api/tags").json()
    assert http.get("/ollama/api/version").json() == http.get("/api/version").json()
    with openai.OpenAI(base_url=str(http.base_url), api_key="unused") as client:
        assert len(client.embeddings.create(model=LOADED, input="hi").data[0].embedding) == 8


@pytest.mark.parametrize("prefix", ["", "/ollama"])
def test_a_pull_of_a_model_that_is_there_succeeds(http: httpx.Client, prefix: str) -> None:
    with closing(ollama.Client(host=f"{str(http.base_url).rstrip('/')}{prefix}")) as client:
        assert client.pull(LOADED).status == "success"
        assert [step.status for step in client.pull(f"{LOADED}:latest", stream=True)][-1] == "success"
        with pytest.raises(ollama.ResponseError) as missing:
            client.pull("none")
    assert missing.value.status_code == 404


def test_upstreams_fields_are_accepted(http: httpx.Client) -> None:
    fields = {"enable_thinking": False, "repetition_context_size": 20, "use_prefix_cache": True}
    reply = http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 200
    assert "use_prefix_cache" not in reply.headers.get("x-exo-warning", "")
    assert "there is no such field" not in reply.headers.get("x-exo-warning", "")


@pytest.mark.parametrize("by_own_id", [False, True])
def test_a_stream_is_cancelled_by_its_id(http: httpx.Client, by_own_id: bool) -> None:
    with http.stream("POST", "/v1/completions", json=ENDLESS, headers={"x-request-id": "mine"}) as reply:
        lines = (line for line in reply.iter_lines() if line)
        name = "mine" if by_own_id else json.loads(next(lines).removeprefix("data: "))["id"]
        assert http.post(f"/v1/cancel/{name}").json()["command_id"] == name
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    assert http.post(f"/v1/cancel/{name}").status_code == 404
    wait_until_idle(http)


def test_a_whole_reply_is_cancelled_by_the_clients_id(http: httpx.Client) -> None:
    body, headers = {**ENDLESS, "stream": False}, {"x-request-id": "mine"}
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(http.post, "/v1/completions", json=body, headers=headers)
        while http.post("/v1/cancel/mine").status_code == 404:
            time.sleep(0.01)
        reply = asking.result()
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "cancelled")
    wait_until_idle(http)


def wait_until_idle(http: httpx.Client) -> None:
    while any(slot["is_processing"] for slot in http.get("/slots").json()):
        time.sleep(0.01)


def test_a_model_is_loaded_by_request_and_shows_that_it_is_loading(tmp_path: Path, gate: Path) -> None:
    with serve(tmp_path, fake_card(LOADED, load_gate=str(gate))) as url, httpx.Client(base_url=url, timeout=60) as http:
        assert http.get(f"/models/{LOADED}").json()["status"]["value"] == "unloaded"
        with ThreadPoolExecutor(1) as threads:
            asking = threads.submit(http.post, "/models/load", json={"model": LOADED})
            while http.get(f"/models/{LOADED}").json()["status"]["value"] != "loading":
                time.sleep(0.01)
            gate.open("wb").close()
        assert asking.result().json() == {"success": True, "model": LOADED}
        assert http.get(f"/models/{LOADED}").json()["status"]["value"] == "loaded"
