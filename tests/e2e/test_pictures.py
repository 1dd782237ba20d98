"""A real model that sees: one picture through every API, counted in the usage, and kept when its runner dies."""

import json
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import needs_vllm
from tests.support.picture_requests import CAT, DIALECTS, DOG, Make, chat, text_of
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.projector import TOKENS, write_projector
from tests.support.tiny.seeing_folder import TOKENS as FOLDER_TOKENS
from tests.support.tiny.seeing_folder import write_seeing
from tests.support.twins import FLOAT32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_gguf(home / "tiny.gguf", Shape())
    write_projector(home / "mmproj.gguf", "mlp", Shape().hidden)
    table = {"path": str(home / "tiny.gguf"), "n_ctx": 2048, "slots": 2, **FLOAT32}
    write_card(home, "sees", {"cuda": {**table, "mmproj": "mmproj.gguf"}})
    write_card(home, "blind", {"cuda": table})
    write_seeing(home / "folder", Shape(head_dim=64))
    folder = {"path": str(home / "folder"), "n_ctx": 2048, "slots": 2, "dtype": "float32", "threads": 1}
    write_card(home, "folder", {"vllm": {**folder, "pictures": True}}, backends=["Vllm"])
    with ServeProgram(home) as program:
        yield program


EVERY = pytest.mark.parametrize("model", ["sees", pytest.param("folder", marks=needs_vllm)])


def ask(server: ServeProgram, make: Make, data: str, model: str = "sees") -> httpx.Response:
    path, body = make(data, model)
    return server.client.post(path, json=body)


@EVERY
def test_every_api_shows_the_model_the_same_picture(server: ServeProgram, model: str) -> None:
    cats = {text_of(ask(server, make, CAT, model)) for make in DIALECTS.values()}
    dogs = {text_of(ask(server, make, DOG, model)) for make in DIALECTS.values()}
    assert len(cats) == len(dogs) == 1
    assert cats != dogs


def test_usage_counts_the_picture_and_what_the_cache_has_of_it(server: ServeProgram) -> None:
    usages = [ask(server, chat, DOG).json()["usage"] for _ in range(2)]
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"] > TOKENS["mlp"]
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == usages[1]["prompt_tokens"] - 1


@needs_vllm
def test_usage_counts_the_picture_in_vllm(server: ServeProgram) -> None:
    usages = [ask(server, chat, DOG, "folder").json()["usage"] for _ in range(2)]
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"] > FOLDER_TOKENS
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == (usages[1]["prompt_tokens"] - 1) // 32 * 32


def test_a_model_without_a_projector_names_the_part(server: ServeProgram) -> None:
    reply = ask(server, chat, CAT, "blind")
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "messages.0.content.0.image_url"
    assert "test/blind" in error["message"]


@EVERY
def test_a_stream_about_a_picture_goes_on_where_its_runner_was_killed(server: ServeProgram, model: str) -> None:
    path, body = chat(CAT, model)
    body |= {"max_tokens": 400, "ignore_eos": True}
    undisturbed = text_of(server.client.post(path, json=body))
    before = {each.pid for each in server.runners()}
    found = ""
    with server.client.stream("POST", path, json={**body, "stream": True}) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if not found and piece:
                for pid in before:
                    os.kill(pid, signal.SIGKILL)
            found += piece
    assert found == undisturbed
    assert not before & {each.pid for each in server.runners()}
