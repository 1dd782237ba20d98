"""A server that is short of file descriptors: idle connections do not cause it, and it passes."""

import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import JsonValue

from exo.config import Limits
from tests import DATA
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card

CPU: JsonValue = ["LlamaCppCpu"]


def limited_python(folder: Path, files: int) -> str:
    """A Python interpreter that may open so many files."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nulimit -Sn {files // 2}\nulimit -Hn {files}\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_more_idle_connections_than_file_descriptors_leave_room_for_requests(tmp_path: Path) -> None:
    write_card(tmp_path, "good", {"cuda": {}}, backends=CPU)
    with ServeProgram(tmp_path, fake=True, python=limited_python(tmp_path, 256)) as server:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (256, 256)
        url = httpx.URL(server.url)
        assert url.port is not None
        idle = [socket.create_connection((url.host, url.port), timeout=DEADLINE_SECONDS) for _ in range(300)]
        assert server.complete("good", max_tokens=4).status_code == 200  # the first request: a runner is started
        for _ in range(3):
            assert httpx.get(f"{server.url}/health", timeout=DEADLINE_SECONDS).status_code == 200
        oldest, newest = idle[0], idle[-1]
        assert oldest.recv(1) == b""
        newest.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert newest.recv(12) == b"HTTP/1.1 200"
        for each in idle:
            each.close()


def tls_server(home: Path, files: int) -> ServeProgram:
    certificate = (str(DATA / "localhost.pem"), str(DATA / "localhost.key.pem"))
    return ServeProgram(home, *certificate, fake=True, python=limited_python(home, files))


def trusting(server: ServeProgram) -> httpx.Client:
    trusted = ssl.create_default_context(cafile=str(DATA / "localhost.pem"))
    return httpx.Client(base_url=server.url, verify=trusted, timeout=DEADLINE_SECONDS)


def connections(server: ServeProgram, count: int) -> list[socket.socket]:
    url = httpx.URL(server.url)
    assert url.port is not None
    return [socket.create_connection((url.host, url.port), timeout=DEADLINE_SECONDS) for _ in range(count)]


@pytest.mark.parametrize("hello", [b"", b"\x16\x03\x01"], ids=["silent", "begun"])
def test_tls_connections_count_before_their_handshake(tmp_path: Path, hello: bytes) -> None:
    write_card(tmp_path, "good", {"cuda": {}}, backends=CPU)
    with tls_server(tmp_path, 256) as server, trusting(server) as early, trusting(server) as late:
        assert early.get("/health").status_code == 200
        idle = connections(server, 1100)
        for each in idle:
            with suppress(OSError):
                each.sendall(hello)
        assert server.process.poll() is None
        assert psutil.Process(server.process.pid).num_fds() < 200
        request = {"model": "good", "prompt": "x", "max_tokens": 4}
        assert late.post("/v1/completions", json=request).status_code == 200  # the first request: a runner is started
        kept = early.get("/health")
        assert kept.status_code == 200
        assert idle[0].recv(1) == b""
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE_SECONDS) == 0
        log = server.log.read_text()
        assert "ERROR" not in log
        assert "could not be accepted" not in log
        for each in idle:
            each.close()


def test_a_tls_connection_is_refused_while_all_others_are_answered(tmp_path: Path) -> None:
    write_card(tmp_path, "slow", {"cuda": {"step_seconds": 0.05}}, backends=CPU)
    body = {"model": "slow", "prompt": "x", "max_tokens": 4000, "stream": True}
    with tls_server(tmp_path, 128) as server, trusting(server) as many, ExitStack() as stack:
        streams = [stack.enter_context(many.stream("POST", "/v1/completions", json=body)) for _ in range(64)]
        assert {each.status_code for each in streams} == {200}
        with trusting(server) as other:
            refused = other.get("/health")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
            streams[0].close()
            wait_until(lambda: other.get("/health").status_code == 200)


def test_a_connection_without_a_request_is_closed_in_the_end(tmp_path: Path) -> None:
    assert Limits().idle_seconds > 75  # proxies give up theirs first
    with ServeProgram(tmp_path, fake=True, EXO_IDLE_TIMEOUT="1") as server:
        url = httpx.URL(server.url)
        assert url.port is not None
        with socket.create_connection((url.host, url.port), timeout=DEADLINE_SECONDS) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while data := client.recv(1 << 16):
                said += data
        assert said.startswith(b"HTTP/1.1 200")
        assert b"connection: close" not in said


def test_a_connection_is_refused_while_all_others_are_answered(tmp_path: Path) -> None:
    write_card(tmp_path, "slow", {"cuda": {"step_seconds": 0.05}}, backends=CPU)
    python = limited_python(tmp_path, 128)
    with (
        ServeProgram(tmp_path, fake=True, python=python) as server,
        httpx.Client(base_url=server.url, timeout=60) as other,
    ):
        body = b'{"model": "slow", "prompt": "x", "max_tokens": 4000, "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        url = httpx.URL(server.url)
        assert url.port is not None
        streams = [socket.create_connection((url.host, url.port), timeout=DEADLINE_SECONDS) for _ in range(64)]
        for each in streams:
            each.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        for each in streams:
            assert each.recv(12) == b"HTTP/1.1 200"
        refused = other.get("/health")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        streams[0].close()
        wait_until(lambda: other.get("/health").status_code == 200)
        for each in streams:
            each.close()


def test_a_server_without_file_descriptors_keeps_what_it_has_and_recovers(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_card(tmp_path, name, {"cuda": {"chat_template": "{{ messages[0].content }}"}}, backends=CPU)
    chat = {"model": "one", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    with ServeProgram(tmp_path, fake=True) as server:

        def logged(text: str) -> bool:
            assert server.client.get("/health").status_code == 200  # keeps the one connection in use
            return text in server.log.read_text()

        assert server.complete("one", max_tokens=4).status_code == 200
        pid = server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        wait_until(lambda: logged("could not be measured") and logged("cannot be listed"))
        assert server.complete("one", max_tokens=4).status_code == 200
        busy = server.client.post("/v1/chat/completions", json=chat)
        assert (busy.status_code, busy.json()["error"]["code"]) == (503, "server_busy")
        failed = server.complete("two", max_tokens=4)
        assert failed.status_code == 503
        assert "Too many open files" in failed.json()["error"]["message"]
        assert {"test/one", "test/two"} <= {each["id"] for each in server.client.get("/v1/models").json()["data"]}

        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert server.client.post("/v1/chat/completions", json=chat).status_code == 200
        wait_until(lambda: server.complete("two", max_tokens=4).status_code == 200)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
