"""How a server ends: told to stop while it is busy, told twice, or killed."""

import json
import os
import signal
import socket
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import JsonValue

from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf

ENDLESS = {"model": "fake", "prompt": "hi", "ignore_eos": True, "stream": True}


@contextmanager
def serving(home: Path, drain_seconds: float, **options: JsonValue) -> Generator[ServeProgram]:
    """A model called "fake"; by default it has one slot and its replies never end."""
    table: dict[str, JsonValue] = {"slots": 1, "n_ctx": 1_000_000_000, "step_seconds": 0.001, **options}
    write_card(home, "fake", {"cuda": table}, backends=["LlamaCppCpu"])
    with ServeProgram(home, fake=True, EXO_DRAIN_TIMEOUT=str(drain_seconds)) as server:
        yield server


@contextmanager
def stream(server: ServeProgram, **body: object) -> Generator[Iterator[str]]:
    with server.client.stream("POST", "/v1/completions", json={**ENDLESS, **body}) as reply:
        assert reply.status_code == 200
        yield (line for line in reply.iter_lines() if line)


def wait_until_draining(server: ServeProgram) -> None:
    """Returns when the signal has been taken."""
    deadline = time.monotonic() + 60
    while server.client.get("/ready").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def error_of(line: str) -> str:
    return json.loads(line.removeprefix("data: "))["error"]["code"]


def ends_with_0(server: ServeProgram, children: list[psutil.Process]) -> None:
    assert server.process.wait(60) == 0
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_runs_and_what_waits_is_finished_and_what_comes_is_refused(tmp_path: Path, number: int) -> None:
    with serving(tmp_path, 60, step_seconds=0.01) as server, httpx.Client(base_url=server.url, timeout=60) as kept:
        assert kept.get("/health").status_code == 200
        with stream(server, max_tokens=200) as running, stream(server, max_tokens=3) as waiting:
            next(running)
            children = server.children()
            server.process.send_signal(number)
            wait_until_draining(server)
            with httpx.Client(base_url=server.url, timeout=60) as new:
                for http in (kept, new):
                    assert http.get("/health").status_code == 200
                    refused = http.post("/v1/completions", json=ENDLESS)
                    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutdown")
                    assert refused.headers["retry-after"] == "1"
            assert list(running)[-1] == "data: [DONE]"
            assert list(waiting)[-1] == "data: [DONE]"
        ends_with_0(server, children)


def test_what_takes_too_long_is_cut_with_an_error_and_no_done(tmp_path: Path) -> None:
    with serving(tmp_path, 0.3) as server, ThreadPoolExecutor() as pool:
        with stream(server) as running, stream(server) as waiting:
            next(running)
            whole = pool.submit(server.complete, "fake", ignore_eos=True)
            children = server.children()
            server.process.send_signal(signal.SIGTERM)
            for lines in (running, waiting):
                *chunks, last = list(lines)
                assert "data: [DONE]" not in chunks
                assert error_of(last) == "shutdown"
        assert (whole.result().status_code, whole.result().headers["retry-after"]) == (503, "1")
        ends_with_0(server, children)


def test_a_request_whose_model_still_loads_is_cut_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    with serving(tmp_path, 0.3, load_gate=str(tmp_path / "gate")) as server:
        with stream(server) as lines:
            next(lines)
            children = server.children()
            server.process.send_signal(signal.SIGTERM)
            assert error_of(list(lines)[-1]) == "shutdown"
        ends_with_0(server, children)


def test_a_second_signal_ends_at_once_even_a_runner_that_will_not_go(tmp_path: Path) -> None:
    with serving(tmp_path, 600, ignore_shutdown=True, log_commands=True) as server:
        with stream(server) as lines:
            next(lines)
            children = server.children()
            server.process.send_signal(signal.SIGTERM)
            wait_until_draining(server)
            server.process.send_signal(signal.SIGTERM)
            assert error_of(list(lines)[-1]) == "shutdown"
        ends_with_0(server, children)
    (log,) = (tmp_path / "exo_log" / "runner_log").glob("*.log")
    assert "shutdown" not in log.read_text()  # it was not asked first, which would take 10 seconds


def test_an_idle_server_ends_whatever_the_time_to_drain(tmp_path: Path) -> None:
    with serving(tmp_path, 100_000) as server:
        assert server.complete("fake", max_tokens=1).status_code == 200
        children = server.children()
        assert len(children) >= 1
        server.process.send_signal(signal.SIGTERM)
        ends_with_0(server, children)


def test_a_real_engine_finishes_its_stream(tmp_path: Path) -> None:
    write_gguf(tmp_path / "good.gguf", Shape())
    table = {"slots": 1, "n_ctx": 2048, "threads": 1, "path": str(tmp_path / "good.gguf")}
    write_card(tmp_path, "good", {"cuda": table})
    with ServeProgram(tmp_path) as server:
        assert server.complete("good", max_tokens=1).status_code == 200
        with stream(server, model="good", max_tokens=2000) as lines:
            next(lines)
            children = server.children()
            server.process.send_signal(signal.SIGTERM)
            assert list(lines)[-1] == "data: [DONE]"
        ends_with_0(server, children)


def test_a_killed_server_leaves_no_runner_and_its_port_is_free(tmp_path: Path) -> None:
    with serving(tmp_path, 60) as server:
        port = httpx.URL(server.url).port or 0
        with stream(server) as lines:
            next(lines)
            children = server.children()
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(60)
            assert psutil.wait_procs(children, timeout=60)[1] == []
            socket.create_server(("127.0.0.1", port)).close()
