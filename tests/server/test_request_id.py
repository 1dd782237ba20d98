"""The id of a request: taken or made, in every reply, and in what the server logs about the request."""

import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import JsonValue

from exo.config import Access
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.server import DEADLINE_SECONDS, ServeProgram, environment, write_card
from tests.support.tiny import Shape, write_gguf

MODEL = "fake/model"
SHORT = {"model": MODEL, "prompt": "hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE)
    access = Access(cors_origins=("http://page.example",))
    with (
        serve(tmp_path_factory.mktemp("server"), card, access=access) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", SHORT, 200),
        ("POST", "/v1/completions", {**SHORT, "stream": True}, 200),
        ("POST", "/v1/completions", {**SHORT, "model": "none"}, 404),
        ("POST", "/v1/completions", {**SHORT, "top_p": 7}, 400),
        ("POST", "/v1/messages", {"model": MODEL}, 400),
        ("POST", "/api/generate", {"model": "none", "prompt": "hi"}, 404),
        ("GET", "/health", None, 200),
        ("GET", "/nothing", None, 404),
    ],
)
def test_the_clients_id_is_in_every_reply(
    http: httpx.Client, method: str, path: str, body: dict[str, object] | None, status: int
) -> None:
    reply = http.request(method, path, json=body, headers={"x-request-id": "client-7"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (status, "client-7")
    ids = {http.request(method, path, json=body).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert "client-7" not in ids


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "caf\u00e9"])
def test_an_id_that_is_not_short_and_printable_is_replaced(http: httpx.Client, given: str) -> None:
    reply = http.get("/health", headers=[(b"x-request-id", given.encode())])
    assert reply.headers["x-request-id"].startswith("req_")


def test_denied_and_malformed_requests_have_one_too(http: httpx.Client) -> None:
    denied = http.get("/health", headers={"host": "evil.example", "x-request-id": "mine"})
    assert (denied.status_code, denied.headers["x-request-id"]) == (403, "mine")
    host, port = http.base_url.host, http.base_url.port
    assert port is not None
    with socket.create_connection((host, port)) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        head = raw.makefile("rb").read()
    assert head.startswith(b"HTTP/1.1 400")
    assert b"\r\nx-request-id: req_" in head


def test_clients_and_pages_can_read_it(http: httpx.Client) -> None:
    own = {"x-request-id": "mine"}
    with openai.OpenAI(base_url=f"{str(http.base_url).rstrip('/')}/v1", api_key="unused") as client:
        raw = client.completions.with_raw_response.create(model=MODEL, prompt="hi", max_tokens=2, extra_headers=own)
        assert raw.request_id == "mine"
    page = http.get("/health", headers={"origin": "http://page.example"})
    assert "x-request-id" in page.headers["access-control-expose-headers"]


def ps(server: ServeProgram, home: Path) -> str:
    command = [sys.executable, "-m", "exo", "ps", "--port", str(httpx.URL(server.url).port)]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, check=True).stdout


def test_the_log_names_the_request(tmp_path: Path) -> None:
    write_card(tmp_path, "tiny", {"cuda": {}})
    with ServeProgram(tmp_path) as server:
        body = {"model": "tiny", "prompt": "hi", "temprature": 1}
        server.client.post("/v1/completions", json=body, headers={"x-request-id": "seek-me"})
        assert "temprature" in server.log.read_text()
        assert "(request seek-me)" in server.log.read_text()


def test_the_log_says_where_a_prompt_departs_from_one_that_it_mostly_repeats(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    table: dict[str, JsonValue] = {"path": str(tmp_path / "tiny.gguf"), "threads": 1, "n_ctx": 4096, "slots": 1}
    write_card(tmp_path, "tiny", {"cuda": table}, backends=["LlamaCppCpu"])
    rest = [97 + at * at % 23 for at in range(1, 1500)]
    with ServeProgram(tmp_path) as server:
        for name, day in (("monday", 70), ("tuesday", 71), ("wednesday", 72)):
            prompt = [*range(40, 60), day, *rest]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
            usage = server.client.post("/v1/completions", json=body, headers={"x-request-id": name}).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] in (0, 20)
        told = [line for line in server.log.read_text().splitlines() if "differs from a cached one" in line]
        end = time.monotonic() + DEADLINE_SECONDS
        while "differs at token 21 and is the same later" not in ps(server, tmp_path):  # a heartbeat tells it
            assert time.monotonic() < end
    assert len(told) == 1
    assert "test/tiny: the prompt of request tuesday" in told[0]
    assert "at token 21 of 1,520" in told[0]
