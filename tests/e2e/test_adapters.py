"""Adapters behind a server: chosen by the request's model, listed, pulled, shown, and kept when a runner dies."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.cards.catalogue import Catalogue
from exo.cli.models.local_models import FileState
from exo.cli.models.show import show_model
from exo.store.store import Store
from exo.worker.host import Host
from tests.support.hub import REPO, LocalHub
from tests.support.server import ServeProgram, long_story, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.adapter import write_gguf_adapter
from tests.support.twins import FLOAT32

TOKENS = 400
ADAPTER_REPO = "org/adapter"


def table(home: Path) -> dict[str, JsonValue]:
    write_gguf(home / "tiny.gguf", Shape())
    lora: list[JsonValue] = []
    for seed, name in enumerate(("first", "second"), 1):
        write_gguf_adapter(home / f"{name}.gguf", Shape(), seed)
        lora.append({"name": name, "path": str(home / f"{name}.gguf")})
    return {"path": str(home / "tiny.gguf"), "n_ctx": 2048, "slots": 4, "lora": lora, **FLOAT32}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_card(home, "tiny", {"cuda": table(home)}, backends=["LlamaCppCpu", "MlxCpu"])
    write_card(home, "tiny:second", {"cuda": {"path": str(home / "tiny.gguf")}})
    with ServeProgram(home) as program:
        yield program


def text(server: ServeProgram, model: str) -> str:
    reply = server.complete(model, **long_story(TOKENS))
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def test_the_model_of_a_request_names_the_adapter(server: ServeProgram) -> None:
    base, adapted = text(server, "tiny"), text(server, "tiny:first")
    assert base != adapted
    for name in ("test/tiny:first", "tiny:first@cuda"):
        assert text(server, name) == adapted
    reply = server.complete("tiny:first", max_tokens=1)
    assert reply.json()["model"] == "test/tiny:first"
    ollama = {"model": "tiny:first", "prompt": "once upon a time", "raw": True, "stream": False}
    answered = server.client.post("/api/generate", json={**ollama, "options": {"num_predict": 1}})
    assert answered.json()["model"] == "test/tiny:first"


def scaled(*lora: JsonValue, model: str = "tiny") -> dict[str, object]:
    return {**long_story(TOKENS), "model": model, "lora": [*lora]}


FIRST: JsonValue = {"id": 0, "scale": 1}


def completed(server: ServeProgram, body: dict[str, object]) -> str:
    reply = server.client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def test_a_request_states_the_scales_of_adapters(server: ServeProgram) -> None:
    base, adapted = text(server, "tiny"), text(server, "tiny:first")
    assert completed(server, scaled({"name": "first", "scale": 0}, {"id": 1, "scale": 0})) == base
    assert completed(server, scaled(FIRST)) == completed(server, scaled({"name": "first", "scale": 1})) == adapted
    half = completed(server, scaled({"id": 0, "scale": 0.5}))
    both = completed(server, scaled(FIRST, {"id": 1, "scale": 1}))
    assert len({base, adapted, half, both}) == 4
    llama = {**scaled(FIRST), "n_predict": TOKENS, "max_tokens": None}
    assert server.client.post("/completion", json=llama).json()["content"] == adapted
    messages: JsonValue = [{"role": "user", "content": "tell"}]
    chat = {**scaled(FIRST), "prompt": None, "messages": messages}
    named = {**chat, "lora": [], "model": "tiny:first"}
    replies = [server.client.post("/v1/chat/completions", json=each).json()["choices"] for each in (chat, named)]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        (scaled({"id": 2, "scale": 1}), "lora.0", "test/tiny has no such adapter; it has first (id 0), second (id 1)"),
        (scaled(FIRST, {"name": "third", "scale": 1}), "lora.1", "test/tiny has no such adapter"),
        (scaled(FIRST, {"name": "first", "scale": 1}), "lora.1", "the adapter 'first' is there twice"),
        (scaled(FIRST, model="tiny:second"), "lora.0", "test/tiny:second has no such adapter; it has none"),
        (scaled({"id": 0}), "lora.0.scale", "required"),
        (scaled({"scale": 1}), "lora.0", "give either id or name"),
        (scaled({"id": 0, "scale": 1000}), "lora.0.scale", "100"),
        (scaled(FIRST, model="tiny@mlx"), "lora", "needs adapter_scales"),
        (scaled(FIRST, model="tiny:first"), "lora", "the model has the adapter 'first' already; name test/tiny alone"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused_by_their_field(
    server: ServeProgram, body: dict[str, object], param: str, reason: str
) -> None:
    reply = server.client.post("/v1/completions", json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]


def test_another_model_of_that_name_has_precedence(server: ServeProgram) -> None:
    """A model id with a colon, which the tags of Ollama's models have."""
    reply = server.complete("tiny:second", max_tokens=1)
    assert reply.json()["model"] == "test/tiny:second"
    assert server.complete("test/tiny:second", max_tokens=1).json()["model"] == "test/tiny:second"


def test_an_adapter_that_is_not_there_is_an_error_that_names_those_that_are(server: ServeProgram) -> None:
    reply = server.complete("tiny:third", max_tokens=1)
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == "test/tiny has no adapter 'third'; it has first, second"
    other = server.complete("tiny:first@mlx", max_tokens=1)
    assert other.status_code == 400
    assert "has no adapter 'first' in [mlx]" in other.json()["error"]["message"]
    vectors = server.client.post("/v1/embeddings", json={"model": "tiny:first", "input": "hello"})
    assert vectors.status_code == 400
    assert "adapters change generated text only" in vectors.json()["error"]["message"]


def test_adapters_are_listed_behind_their_model(server: ServeProgram) -> None:
    models = {each["id"]: each for each in server.client.get("/v1/models").json()["data"]}
    assert models["test/tiny:first"]["parent"] == "test/tiny"
    assert models["test/tiny:first"]["aliases"] == ["tiny:first"]
    assert "parent" not in models["test/tiny"]
    assert server.client.get("/v1/models/tiny:first").json()["id"] == "test/tiny:first"
    assert server.client.get("/v1/models/tiny:third").status_code == 404
    tags = {each["name"]: each["details"] for each in server.client.get("/api/tags").json()["models"]}
    assert {"test/tiny:first", "tiny:first", "test/tiny:second", "tiny:second"} < tags.keys()
    assert tags["tiny:first"]["parent_model"] == "test/tiny"
    assert tags["tiny:second"]["parent_model"] == "", "another model has that name"
    known = server.client.get("/lora-adapters", params={"model": "tiny"}).json()
    assert [(each["id"], each["name"]) for each in known] == [(0, "first"), (1, "second")]


BOTH = scaled({"id": 0, "scale": 0.5}, {"id": 1, "scale": 1.5})


@pytest.mark.parametrize("body", [{"model": "tiny:first", **long_story(TOKENS)}, BOTH])
def test_a_stream_goes_on_with_its_adapters_where_its_runner_was_killed(
    server: ServeProgram, body: dict[str, object]
) -> None:
    undisturbed = completed(server, body)
    before = {each.pid for each in server.runners()}
    found = ""
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line[6:])["choices"][0]["text"]
            if not found and piece:
                for each in server.runners():
                    os.kill(each.pid, signal.SIGKILL)
            found += piece
    assert found == undisturbed
    assert not before & {each.pid for each in server.runners()}


def test_an_adapter_on_the_hub_is_pulled_with_its_model_and_shown(tmp_path: Path) -> None:
    home = tmp_path / "home"
    lora: list[JsonValue] = [{"name": "sql", "repo": ADAPTER_REPO, "file": "*f32.gguf"}]
    cuda: dict[str, JsonValue] = {"repo": REPO, "file": "*Q8_0.gguf", "n_ctx": 512, "threads": 1, "lora": lora}
    write_card(home, "tiny", {"cuda": cuda})
    write_gguf(tmp_path / "model.gguf", Shape())
    write_gguf_adapter(tmp_path / "adapter.gguf", Shape())
    with LocalHub() as hub:
        hub.commit({"model-Q8_0.gguf": tmp_path / "model.gguf"})
        hub.commit({"adapter-f32.gguf": tmp_path / "adapter.gguf"}, ADAPTER_REPO)
        with ServeProgram(home, HF_ENDPOINT=hub.url) as server:
            pulled = server.client.post("/v1/models/pull", json={"model": "tiny", "stream": False})
            assert pulled.status_code == 200, pulled.text
            assert server.complete("tiny:sql", max_tokens=2).status_code == 200
            shown = adapter_files(home)
            assert (shown.source, shown.state) == ("org/adapter: *f32.gguf", "present")
            (home / "models" / "org--adapter" / "adapter-f32.gguf").unlink()
            assert server.complete("tiny:sql@cuda", max_tokens=2).status_code == 200, "it is loaded"
        with ServeProgram(home, HF_ENDPOINT=hub.url) as server:
            message = server.complete("tiny:sql", max_tokens=2).json()["error"]["message"]
            assert "org/adapter, test/tiny's adapter sql, is not on disk" in message


def adapter_files(home: Path) -> FileState:
    """The facts that ``exo show`` prints of the adapter's files."""
    catalogue = Catalogue.load(home / "custom_model_cards")
    card = catalogue.get("tiny")
    assert card is not None
    host = Host("Linux", "x86_64", 4, 8 << 30, 4 << 30, (), {})
    (engine,) = show_model(card, catalogue, Store([home / "models"]), host).engines
    return engine.adapters["sql"]
