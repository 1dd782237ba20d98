"""``exo top`` in a terminal and in a pipe, against a real server with the fake runner."""

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.server import ServeProgram, environment, write_card
from tests.support.terminal import CTRL_C, Terminal

ENDLESS = {"model": "slow", "prompt": "hi", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture
def server(tmp_path: Path) -> Generator[ServeProgram]:
    write_card(tmp_path, "quick", {"cuda": {}}, backends=["LlamaCppCpu"])
    write_card(tmp_path, "slow", {"cuda": {"step_seconds": 0.05}}, backends=["LlamaCppCpu"])
    with ServeProgram(tmp_path, fake=True) as program:
        yield program


@contextmanager
def running(server: ServeProgram, name: str) -> Generator[None]:
    """A request that lasts as long as the context."""
    headers = {"x-request-id": name, "user-agent": "agent/1.0"}
    with server.client.stream("POST", "/v1/completions", json=ENDLESS, headers=headers) as reply:
        lines = reply.iter_lines()  # the request would end with this iterator
        while not next(lines).startswith("data: "):
            pass
        yield


def test_it_is_live_in_a_terminal(server: ServeProgram, tmp_path: Path) -> None:
    port = str(httpx.URL(server.url).port)
    with Terminal(tmp_path, "top", "--port", port) as terminal, running(server, "seek-me"):
        terminal.wait_for(r"Memory +Reserved +Used +Free")
        terminal.wait_for(r"seek-me +agent/1.0 127.0.0.1 +test/slow@cuda +decode")
        reply = server.client.post(
            "/v1/completions",
            json={"model": "quick", "prompt": "hi", "max_tokens": 2},
            headers={"x-request-id": "later"},
        )
        assert reply.status_code == 200
        terminal.wait_for(r"test/quick +cuda +Ready")
        terminal.wait_for(r"later +.* +finished +2 +0 +2")
        terminal.keys(CTRL_C)
        assert terminal.process.wait(60) == 0


def test_it_prints_once_into_a_pipe(server: ServeProgram, tmp_path: Path) -> None:
    with running(server, "seek-me"):
        command = [sys.executable, "-m", "exo", "top", "--port", str(httpx.URL(server.url).port)]
        done = subprocess.run(
            command, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=True
        )
    assert "\x1b" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    (model,) = (words for words in lines if words[:1] == ["test/slow"])
    assert model[1:4] == ["cuda", "Running", "1/4"]
    (ram,) = (words for words in lines if words[:1] == ["RAM"])
    assert ram[2::2] == ["GB"] * 3
    (request,) = (words for words in lines if words[:1] == ["seek-me"])
    assert request[1:5] == ["agent/1.0", "127.0.0.1", "test/slow@cuda", "decode"]
