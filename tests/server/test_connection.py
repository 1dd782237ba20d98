"""What a connection takes before any route is asked: bounded heads, and requests that arrive in time."""

import json
import socket
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from exo.api.http import connection
from exo.api.http.body import BODY_LIMIT
from exo.config import Access, ApiKey
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

MODEL = "fake/model"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LAST = GET + b"Connection: close\r\n\r\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.URL]:
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE)
    with pytest.MonkeyPatch.context() as patch, serve(tmp_path_factory.mktemp("server"), card) as url:
        patch.setattr(connection, "LINGER_SECONDS", 0.1)
        yield httpx.URL(url)
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}


def connect(url: httpx.URL) -> socket.socket:
    assert url.port is not None
    client = socket.create_connection((url.host, url.port), timeout=60)
    client.settimeout(60)
    return client


def talk(url: httpx.URL, *pieces: bytes) -> bytes:
    """Everything that the server says until it closes the connection, which it may do before it has read everything."""
    with connect(url) as client:
        said = b""
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                client.sendall(piece)
        with suppress(ConnectionResetError):
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
        POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        POST + b"Content-Length: 2, 2\r\n\r\n{}",
        POST + b"Content-Length: +2\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}x\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nContent-Length: 2\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        POST + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
        POST + b"X: a\nContent-Length: 2\r\n\r\n{}",
        POST + b"X: a\rContent-Length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(url: httpx.URL, piece: bytes) -> None:
    assert refusal(talk(url, piece)) == (400, "malformed_request")


def test_a_second_host_header_does_not_help(url: httpx.URL) -> None:
    said = talk(url, GET + b"Host: evil.example\r\nConnection: close\r\n\r\n")
    assert refusal(said) == (403, "host_not_allowed")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_of_http_1_0_gets_no_chunks(url: httpx.URL, version: bytes, stream: bool) -> None:
    fields = {"model": MODEL, "prompt": "hello", "max_tokens": 200, "temperature": 0, "stream": stream}
    body = json.dumps(fields).encode()
    head = POST.replace(b"1.1", version) + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    head, _, reply = talk(url, head + body).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert (b"chunked" in head) == (stream and version == b"1.1")
    if version == b"1.0":
        assert b"connection: close" in head
        lines = reply.decode().split("\n\n") if stream else [reply.decode()]
        choices = [json.loads(line.removeprefix("data: "))["choices"] for line in lines if "choices" in line]
        assert len("".join(choice[0]["text"] for choice in choices)) == 200
        assert lines[-2:] == ["data: [DONE]", ""] or not stream
    else:
        assert reply.endswith(b"0\r\n\r\n" if stream else b"}")


def test_a_key_may_have_blanks_around_it(tmp_path: Path) -> None:
    with serve(tmp_path, fake_card(), access=Access(keys=(ApiKey("alice", "alice's-secret"),))) as url:
        for header in (b"x-api-key:  alice's-secret \t", b"Authorization: Bearer   alice's-secret  "):
            head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            assert talk(httpx.URL(url), head + header + b"\r\n\r\n").startswith(b"HTTP/1.1 200")


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
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("head", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5\r\n"])
def test_a_body_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: bytes
) -> None:
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.3)
    with serve(tmp_path, fake_card()) as url:
        assert refusal(talk(httpx.URL(url), POST + head, b'{"m')) == (408, "request_timeout")
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200


def test_many_slow_clients_harm_no_other(url: httpx.URL) -> None:
    slow = [connect(url) for _ in range(400)]
    try:
        for client in slow[::2]:
            client.sendall(GET)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={}, timeout=60).status_code == 400
    finally:
        for client in slow:
            client.close()


def test_a_body_over_the_limit_is_refused_while_it_comes(url: httpx.URL) -> None:
    with connect(url) as client, suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % (1 << 40))
        for _ in range(BODY_LIMIT // (1 << 20) + 8):
            client.sendall(b" " * (1 << 20))
        assert client.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"identity", b"xchunked", b"identity\r\nTransfer-Encoding: chunked"]
)
def test_a_transfer_coding_that_is_not_undone_is_refused(url: httpx.URL, coding: bytes) -> None:
    said = talk(url, POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + GET + b"\r\n")
    assert refusal(said) == (501, "unsupported_transfer_encoding")


def test_a_tunnel_is_refused_and_what_follows_is_not_read_as_a_request(url: httpx.URL) -> None:
    for target in (b"example.com:443", b"/v1/models"):
        said = talk(url, b"CONNECT " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", GET + b"\r\n")
        assert refusal(said) == (405, "method_not_allowed")


CHAT: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
DIALECTS: dict[str, dict[str, object]] = {
    "/v1/completions": {"model": MODEL, "prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": MODEL, "input": "hi", "max_output_tokens": 2},
    "/v1/messages": CHAT,
    "/api/chat": {"model": MODEL, "messages": CHAT["messages"], "options": {"num_predict": 2}},
    "/api/generate": {"model": MODEL, "prompt": "hi", "options": {"num_predict": 2}},
    "/tokenize": {"model": MODEL, "content": "hi"},
}
UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",
    "websocket": b"connection: keep-alive, upgrade\r\nUPGRADE: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "several": b"Upgrade: TLS/1.0\r\nConnection: Upgrade\r\nConnection: keep-alive\r\nUpgrade: h2c\r\n",
}


def replies(url: httpx.URL, *pieces: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each reply until the server closes the connection."""
    with connect(url) as client:
        return replies_to(client, *pieces)


def replies_to(client: socket.socket, *pieces: bytes) -> list[tuple[int, bytes]]:
    """Each piece is a packet of its own."""
    found: list[tuple[int, bytes]] = []
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            client.sendall(piece)
            threading.Event().wait(0.02)  # so that the server reads the pieces apart
    stream = client.makefile("rb")
    with suppress(ConnectionResetError):  # the server closes a connection before it has read everything
        while line := stream.readline():
            headers: dict[bytes, bytes] = {}
            while (header := stream.readline()) != b"\r\n":
                name, _, value = header.partition(b":")
                headers[name.lower()] = value.strip()
            if line.startswith(b"HTTP/1.1 100"):
                continue
            body = b""
            if headers.get(b"transfer-encoding") == b"chunked":
                while size := int(stream.readline(), 16):
                    body += stream.read(size)
                    stream.readline()
                stream.readline()
            else:
                body = stream.read(int(headers[b"content-length"]))
            found.append((int(line.split()[1]), body))
    return found


def request(path: str, body: bytes, headers: bytes = b"", *, chunked: bool = False) -> tuple[bytes, bytes]:
    """A POST's head and body."""
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\n%bContent-Type: application/json\r\n%b\r\n\r\n"
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    return head % (path.encode(), headers, framing), sent


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("path", DIALECTS)
def test_an_upgrade_is_declined_by_serving_the_request(url: httpx.URL, path: str, upgrade: str) -> None:
    body = json.dumps(DIALECTS[path]).encode()
    for chunked in (False, True):
        head, sent = request(path, body, UPGRADES[upgrade], chunked=chunked)
        middle = len(sent) // 2
        for pieces in ((head + sent,), (head, sent), (head[:70], head[70:] + sent[:middle], sent[middle:])):
            said = replies(url, *pieces, LAST)
            assert [status for status, _ in said] == [200, 200], said
            assert said[1][1] == b'{"status":"ok"}'


def test_the_body_of_a_declined_upgrade_is_no_request(url: httpx.URL) -> None:
    """It looks like one, and would be executed behind a proxy's back."""
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for chunked in (False, True):
        head, sent = request("/v1/completions", hidden, UPGRADES["h2c"], chunked=chunked)
        for pieces in ((head + sent,), (head, sent)):
            said = replies(url, *pieces, LAST)
            assert [status for status, _ in said] == [400, 200], said


def test_upgrades_may_be_pipelined_and_expect_to_be_told_to_go_on(url: httpx.URL) -> None:
    body = json.dumps(DIALECTS["/v1/completions"]).encode()
    head, sent = request("/v1/completions", body, UPGRADES["h2c"] + b"Expect: 100-continue\r\n")
    without_body = GET + UPGRADES["websocket"] + b"\r\n"
    said = replies(url, (head + sent + without_body) * 3 + LAST)
    assert [status for status, _ in said] == [200] * 7
    many = replies(url, without_body * 2000 + LAST)
    assert [status for status, _ in many] == [200] * 2001


def test_trailers_are_no_headers(tmp_path: Path) -> None:
    """They come after the headers were checked, and must not stand in for one."""
    access = Access(keys=(ApiKey("alice", "alice-secret"),))
    with serve(tmp_path, fake_card(), access=access) as url:
        head, _ = request("/v1/completions", b"", chunked=True)
        late = head + b"2\r\n{}\r\n0\r\nAuthorization: Bearer alice-secret\r\n\r\n"
        assert [status for status, _ in replies(httpx.URL(url), late, LAST)] == [401, 200]


SLOW = {"model": MODEL, "prompt": "hi", "max_tokens": 40, "stream": True}


@pytest.mark.parametrize(
    ("late", "status"),
    [
        (b"Content-Length: 1000\r\n\r\n{", 408),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", 408),
        (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (b"bad header\r\n\r\n", 400),
        (b"x: " + b"a" * 100_000, 431),
        (b"x: ", 408),
    ],
    ids=["late", "late chunks", "bad chunk", "coding", "bad header", "large", "late head"],
)
def test_a_refusal_waits_for_the_reply_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: bytes, status: int
) -> None:
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.1)
    with serve(tmp_path, fake_card(MODEL, step_seconds=0.02)) as url, connect(httpx.URL(url)) as client:
        client.sendall(b"".join(request("/v1/completions", json.dumps(SLOW).encode())))
        assert client.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        if status == 408:  # only now, since the first request might take as long on a busy machine
            monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
            monkeypatch.setattr(connection, "BODY_SECONDS", 0.5)
        said = replies_to(client, POST, late)
        assert [status for status, _ in said] == [200, status], said
        assert said[0][1].endswith(b"data: [DONE]\n\n")


def test_a_large_head_is_refused_although_it_comes_with_the_request_before_it(tmp_path: Path) -> None:
    with serve(tmp_path, fake_card(MODEL)) as url:
        head, body = request("/v1/completions", json.dumps(SLOW).encode())
        said = replies(httpx.URL(url), head + body + POST + b"x: " + b"a" * 100_000)
        assert [status for status, _ in said] == [200, 431], said


def test_a_client_that_leaves_ends_the_request_before_the_one_it_has_pipelined(tmp_path: Path) -> None:
    with serve(tmp_path, fake_card(MODEL, step_seconds=0.02, n_ctx=100_000)) as url:

        def wait_until_active(count: int) -> None:
            for _ in range(300):
                if [each["active"] for each in httpx.get(f"{url}/v1/instances", timeout=60).json()["data"]] == [count]:
                    return
                threading.Event().wait(0.1)
            pytest.fail(f"there are not {count} active requests")

        endless = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 90_000}).encode()
        with connect(httpx.URL(url)) as client:
            client.sendall(b"".join(request("/v1/completions", endless)) * 2)
            wait_until_active(1)
        wait_until_active(0)
