"""What a user should know of a model's files is in ps, in show and once in a reply."""

import json
from collections.abc import Iterator

import pytest

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.runner_cuda.loading.estimate import estimate
from tests.support.edited_gguf import Edit, rewrite
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.encoder import Encoder

NO_PRE = "does not name its pre-tokenizer"
CODE = "names code of its own (auto_map), which is not run"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "sound.gguf", Shape())
    rewrite(home / "sound.gguf", home / "gguf.gguf", Edit(keys={"tokenizer.ggml.pre": None}))
    write_card(home, "gguf", {"cuda": {"path": str(home / "gguf.gguf"), "n_ctx": 256, "slots": 1}})
    write_mlx(home / "folder", Shape())
    config = json.loads((home / "folder" / "config.json").read_text())
    (home / "folder" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "a.B"}}))
    write_card(home, "folder", {"mlx": {"path": str(home / "folder"), "n_ctx": 256, "slots": 1}}, backends=["MlxCpu"])
    Encoder("mean").write(home / "encoder.gguf")
    write_card(home, "encoder", {"cuda": {"path": str(home / "encoder.gguf")}}, tasks=["TextGeneration"])
    with ServeProgram(home) as program:
        yield program


@pytest.mark.parametrize(("model", "note"), [("gguf", NO_PRE), ("folder", CODE)])
def test_the_first_reply_and_the_list_of_instances_tell_a_fault(server: ServeProgram, model: str, note: str) -> None:
    first, second = (server.complete(model, max_tokens=1) for _ in range(2))
    assert note in first.headers["x-exo-warning"]
    assert note not in second.headers.get("x-exo-warning", "")
    instances = server.client.get("/v1/instances").json()["data"]
    assert [note in each["notes"][0] for each in instances if each["model"] == f"test/{model}"] == [True]


def test_the_estimate_which_show_prints_tells_it_before_the_model_is_loaded(server: ServeProgram) -> None:
    path = server.log.parent / "gguf.gguf"
    load = Load(model_id="test/gguf", backend="LlamaCppCpu", table={"path": str(path)})
    (note,) = estimate(Estimate(load=load)).notes
    assert NO_PRE in note


def test_an_encoder_that_is_asked_to_chat_says_that_it_is_one(server: ServeProgram) -> None:
    body = {"model": "encoder", "messages": [{"role": "user", "content": "hi"}]}
    reply = server.client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_chat_template")
    assert (
        "this model is an encoder, which generates no text; it is for /v1/embeddings"
        in reply.json()["error"]["message"]
    )
