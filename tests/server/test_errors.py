"""Whatever goes wrong, the client gets OpenAI's envelope, and the server goes on."""

import json
import logging
from collections.abc import Generator, Iterator

import httpx
import pytest
from fastapi import FastAPI

from exo.api.http.body import BODY_LIMIT
from exo.api.http.error_reply import install
from exo.api.http.errors import error_body
from exo.serving.errors import from_failed
from exo.worker.protocol.events import ErrorCode, Failed
from tests.conftest import fake_card
from tests.support.api_server import serve

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    with (
        serve(tmp_path_factory.mktemp("server"), fake_card()) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def error(reply: httpx.Response) -> tuple[int, str, str | None]:
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    kind = "invalid_request_error" if reply.status_code < 500 else "server_error"
    assert body["error"]["type"] == kind
    assert body["error"]["message"]
    return reply.status_code, body["error"]["code"], body["error"]["param"]


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert error(http.get("/v1/nothing")) == (404, "not_found", None)
    assert error(http.post("/v1/images/generations", json={})) == (404, "not_found", None)
    wrong = http.get(CHAT)
    assert error(wrong) == (405, "method_not_allowed", None)
    assert wrong.headers["allow"] == "POST"
    assert error(http.get("/health/x")) == (404, "not_found", None)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_a_body_of_another_type(http: httpx.Client, media_type: str) -> None:
    reply = http.post(CHAT, content=b"{}", headers={"content-type": media_type})
    assert error(reply) == (415, "unsupported_media_type", None)


def test_a_body_without_a_type_or_with_an_unknown_encoding(http: httpx.Client) -> None:
    assert error(http.post(CHAT, content=b"{}")) == (400, "missing_parameter", "messages")
    reply = http.post(CHAT, content=b"{}", headers={**JSON, "content-encoding": "br"})
    assert error(reply) == (415, "unsupported_media_type", None)


def test_a_type_with_parameters_is_accepted(http: httpx.Client) -> None:
    reply = http.post(CHAT, content=b"{}", headers={"content-type": "Application/JSON; charset=utf-8"})
    assert error(reply) == (400, "missing_parameter", "messages")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000])
def test_a_body_that_is_no_json(http: httpx.Client, body: bytes) -> None:
    assert error(http.post(CHAT, content=body, headers=JSON)) == (400, "invalid_json", None)


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"x"'])
def test_a_body_that_is_no_object(http: httpx.Client, body: bytes) -> None:
    assert error(http.post(CHAT, content=body, headers=JSON)) == (400, "invalid_value", None)


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    large = b" " * (BODY_LIMIT + 1)
    assert error(http.post(CHAT, content=large, headers=JSON)) == (413, "request_too_large", None)

    def pieces() -> Iterator[bytes]:
        yield from [b" " * (1 << 20)] * 18

    assert error(http.post(CHAT, content=pieces(), headers=JSON)) == (413, "request_too_large", None)
    assert error(http.post(CHAT, content=b" " * BODY_LIMIT, headers=JSON)) == (400, "invalid_json", None)


def test_fields_are_checked_before_anything_is_loaded(http: httpx.Client) -> None:
    body = {"model": "fake/model", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}
    assert error(http.post(CHAT, json=body)) == (400, "invalid_value", "temperature")
    assert http.get("/ready").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model(http: httpx.Client, stream: bool) -> None:
    body = {"model": "fake/mdoel", "messages": [{"role": "user", "content": "x"}], "stream": stream}
    reply = http.post(CHAT, json=body)
    assert error(reply) == (404, "model_not_found", "model")
    assert "fake/model" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", 400),
        ("context_length_exceeded", 400),
        ("model_not_found", 404),
        ("model_misconfigured", 400),
        ("model_load_failed", 503),
        ("out_of_memory", 503),
        ("engine_error", 500),
        ("runner_died", 503),
        ("shutdown", 503),
    ],
)
def test_a_runners_failure_has_its_status(code: ErrorCode, status: int) -> None:
    body = error_body(from_failed(Failed(code=code, message="m"), params={"prompt": "messages"}))
    assert (body.status, body.code, body.message) == (status, code, "m")
    assert ("retry-after" in body.headers) == (code in ("runner_died", "shutdown"))


def test_a_runners_parameter_gets_the_clients_name() -> None:
    def param(name: str) -> str | None:
        failed = Failed(code="invalid_request", message="m", param=name)
        return from_failed(failed, params={"prompt": "messages"}).param

    assert param("prompt") == "messages"
    assert param("sampling.top_k") == "top_k"
    assert param("stop") == "stop"


async def test_what_nobody_foresaw_tells_the_log_everything_and_the_client_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    install(app)

    @app.get("/boom")
    async def boom() -> None:
        raise ZeroDivisionError("secret")

    assert boom
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    with caplog.at_level(logging.ERROR):
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            reply = await client.get("/boom")
    assert error(reply) == (500, "internal_error", None)
    assert "secret" not in json.dumps(reply.json())
    assert "secret" in caplog.text
