"""What a connection takes before any route is asked: bounded heads, and requests that arrive in time."""

import socket
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from exo.api import connection
from exo.api.body import BODY_LIMIT
from tests.api_server import serve
from tests.conftest import fake_card

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def url(tmp_path: Path) -> Generator[httpx.URL]:
    with serve(tmp_path, fake_card()) as url:
        yield httpx.URL(url)
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def connect(url: httpx.URL) -> socket.socket:
    assert url.port is not None
    client = socket.create_connection((url.host, url.port), timeout=60)
    client.settimeout(60)
    return client


def talk(url: httpx.URL, *pieces: bytes) -> bytes:
    """Everything that the server says until it closes the connection."""
    with connect(url) as client:
        for piece in pieces:
            with suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(piece)
        said = b""
        while data := client.recv(1 << 16):
            said += data
        return said


def refusal(said: bytes) -> tuple[int, str]:
    """Status and code of the one reply, which must be in OpenAI's envelope."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert body.startswith(b'{"error":{"message":"'), said
    assert b"connection: close" in head
    return int(head.split()[1]), body.rpartition(b'"code":"')[2].split(b'"')[0].decode()


HEADS: dict[str, tuple[bytes, ...]] = {
    "one large header": (GET, b"x: " + b"a" * (1 << 20) + b"\r\n\r\n"),
    "a large header without an end": (GET, b"x: ", *[b"a" * 4096] * 40),
    "a large name": (GET, b"a" * (1 << 20) + b": x\r\n\r\n"),
    "many headers": (GET, b"".join(b"x-%d: y\r\n" % number for number in range(10_000)) + b"\r\n"),
    "many headers one by one": (GET, *(b"x-%d: y\r\n" % number for number in range(500)), b"\r\n"),
    "a large path": (b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    "a large query without an end": (b"GET /v1/route?model=", *[b"a" * 4096] * 40),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_is_too_large_is_refused(url: httpx.URL, case: str) -> None:
    assert refusal(talk(url, *HEADS[case])) == (431, "headers_too_large")


def test_a_head_just_within_the_limits_is_accepted(url: httpx.URL) -> None:
    headers = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 480) for number in range(connection.HEADER_LIMIT - 2))
    said = talk(url, GET + b"Connection: close\r\n" + headers + b"\r\n")
    assert said.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "piece",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        GET + b"bad header\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n{}",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(url: httpx.URL, piece: bytes) -> None:
    assert refusal(talk(url, piece)) == (400, "malformed_request")


def test_a_second_host_header_does_not_help(url: httpx.URL) -> None:
    said = talk(url, GET + b"Host: evil.example\r\nConnection: close\r\n\r\n")
    assert refusal(said) == (403, "host_not_allowed")


def test_a_request_may_follow_another_at_once(url: httpx.URL) -> None:
    said = talk(url, GET + b"\r\n" + GET + b"Connection: close\r\n\r\n")
    assert said.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    "pieces", [(), (GET,), (b"GET /hea",), (GET + b"\r\n" + GET,)], ids=["nothing", "no end", "a line", "the second"]
)
def test_a_head_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pieces: tuple[bytes, ...]
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serve(tmp_path, fake_card()) as url:
        said = talk(httpx.URL(url), *pieces)
        assert refusal(said[said.rindex(b"HTTP/1.1") :]) == (408, "request_timeout")
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("head", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"])
def test_a_body_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: bytes
) -> None:
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.3)
    with serve(tmp_path, fake_card()) as url:
        assert refusal(talk(httpx.URL(url), POST + head, b'{"m')) == (408, "request_timeout")
        assert httpx.get(f"{url}/health").status_code == 200


def test_many_slow_clients_harm_no_other(url: httpx.URL) -> None:
    slow = [connect(url) for _ in range(400)]
    try:
        for client in slow[::2]:
            client.sendall(GET)
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={}).status_code == 400
    finally:
        for client in slow:
            client.close()


def test_a_body_over_the_limit_is_refused_while_it_comes(url: httpx.URL) -> None:
    with connect(url) as client, suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % (1 << 40))
        for _ in range(BODY_LIMIT // (1 << 20) + 8):
            client.sendall(b" " * (1 << 20))
        assert client.recv(100).startswith(b"HTTP/1.1 413")
