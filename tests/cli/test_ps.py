"""``exo ps`` against real servers whose runners work, are killed and fail to load."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import JsonValue
from rich.console import Console

from exo.api.admin.runners import DeviceMemory, Instance, InstanceList, LastFailure
from exo.cli.server.ps import show
from exo.worker.protocol.cores import physical_cores, shares
from exo.worker.protocol.events import CpuUse
from tests.support.server import ServeProgram, environment, write_card
from tests.support.tiny import Shape, write_gguf

Row = dict[str, Any]


def ps(server: ServeProgram, *arguments: str) -> subprocess.CompletedProcess[str]:
    url = httpx.URL(server.url)
    return run_ps(server.log.parent, "--port", str(url.port), *arguments)


def run_ps(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exo", "ps", *arguments]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=60, check=False)


def rows(server: ServeProgram) -> list[Row]:
    return server.client.get("/v1/instances").json()["data"]


def until(server: ServeProgram, met: Callable[[Row], bool]) -> None:
    """Returns once the only instance is so; the time limit of the whole run is the only other end."""
    while not met(rows(server)[0]):
        time.sleep(0.02)


@contextmanager
def fakes(home: Path, **tables: dict[str, JsonValue]) -> Generator[ServeProgram]:
    """Models by name, with the options of their fake runner."""
    for name, table in tables.items():
        write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"])
    with ServeProgram(home, fake=True) as server:
        yield server


def an_instance(**fields: object) -> Instance:
    usual: dict[str, object] = {
        "model": "org/model",
        "runner": "cuda",
        "instance": "x",
        "backend": "LlamaCppCpu",
        "devices": [],
        "state": "Running",
        "layers_loaded": 0,
        "total_layers": 0,
        "slots": 0,
        "active": 0,
        "waiting": 0,
        "model_bytes": 0,
        "pid": None,
        "started": 0,
        "deaths": 0,
        "last_failure": None,
        "tokens_per_second": 0,
        "memory_reserved": 0,
        "device_memory_reserved": 0,
        "memory_measured": None,
        "device_memory_measured": None,
        "device_memory": [],
        "pinned": False,
        "expires_seconds": None,
        "retry_seconds": 0,
    }
    return Instance.model_validate({**usual, **fields})


def test_a_killed_runner_is_shown_with_its_signal_until_another_works_and_counted_for_ever(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    table: dict[str, JsonValue] = {"path": str(tmp_path / "tiny.gguf"), "n_ctx": 512, "threads": 1, "slots": 3}
    write_card(tmp_path, "tiny", {"cuda": table})
    with ServeProgram(tmp_path) as server:
        assert rows(server) == []
        assert "no model is loaded" in ps(server).stdout
        assert server.complete("tiny", max_tokens=1).status_code == 200
        (runner,) = server.runners()
        (row,) = rows(server)
        assert (row["model"], row["runner"], row["backend"], row["devices"]) == (
            "test/tiny",
            "cuda",
            "LlamaCppCpu",
            ["CPU"],
        )
        assert (row["state"], row["slots"], row["pid"], row["deaths"]) == ("Ready", 3, runner.pid, 0)
        assert row["context_length"] == 512
        assert " 512 " in ps(server).stdout
        assert abs(row["started"] - runner.create_time()) < 60
        assert row["model_bytes"] > 100_000
        assert row["last_failure"] is None
        shown = json.loads(ps(server, "--json").stdout)
        (same,) = shown["data"]
        measured = ("memory_reserved", "memory_measured", "device_memory_measured")
        moving = {key: same[key] for key in ("tokens_per_second", "cpu", "prefixes", *measured)}
        assert shown == {"object": "list", "data": [{**row, **moving}], "notices": []}

        runner.send_signal(signal.SIGKILL)
        until(server, lambda each: each["pid"] is None)
        (row,) = rows(server)
        assert (row["state"], row["deaths"], row["retry_seconds"]) == ("Failed", 1, 0)
        assert row["last_failure"]["code"] == "runner_died"
        assert "killed by SIGKILL, which the kernel does when memory runs out" in row["last_failure"]["message"]
        shown = ps(server)
        assert "Failed" in shown.stdout
        assert "test/tiny@cuda failed" in shown.stdout
        assert "SIGKILL" in shown.stdout

        assert server.complete("tiny", max_tokens=1).status_code == 200
        (successor,) = server.runners()
        (again,) = rows(server)
        assert (again["state"], again["pid"], again["deaths"]) == ("Ready", successor.pid, 1)
        assert again["last_failure"] == row["last_failure"]


def test_a_model_that_keeps_dying_shows_what_its_replies_say_and_when_it_is_tried_again(tmp_path: Path) -> None:
    with fakes(tmp_path, dies={"die_after": 0, "die_with": 7}, well={}) as server:
        assert server.complete("well", max_tokens=1).status_code == 200
        refused = server.complete("dies")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "runner_died")
        well, dead = rows(server)
        assert (well["state"], well["deaths"], well["retry_seconds"]) == ("Ready", 0, 0)
        assert (dead["model"], dead["state"], dead["pid"], dead["slots"]) == ("test/dies", "Failed", None, 4)
        assert dead["deaths"] > 1
        message = "the runner exited with code 7; the end of its standard error:\nthe fake runner dies as ordered"
        assert dead["last_failure"]["message"] == message
        assert message in refused.json()["error"]["message"]
        assert f"ago: {message}" in ps(server).stdout


def test_models_that_answer_at_the_same_time_share_the_cores_and_ps_says_so(tmp_path: Path) -> None:
    def threads() -> list[int | None]:
        return [each["cpu"] and each["cpu"]["threads"] for each in rows(server)]

    def answering(model: str) -> AbstractContextManager[httpx.Response]:
        """A stream that ends when it is left."""
        body = {"model": model, "prompt": "x", "stream": True}
        return server.client.stream("POST", "/v1/completions", json=body)

    endless: dict[str, JsonValue] = {"step_seconds": 0.01, "n_ctx": 1_000_000_000}
    with fakes(tmp_path, one=endless, other=endless) as server, answering("one"):
        with answering("other"):
            expected = sorted(shares(physical_cores(), ("one", "other")).values())
            while None in threads() or sorted(filter(None, threads())) != expected:
                time.sleep(0.02)
            assert "test/one@cuda computes with" in ps(server).stdout
        while threads()[0] != physical_cores():
            time.sleep(0.02)


def test_what_other_programs_cost_a_model_is_told(tmp_path: Path) -> None:
    busy = CpuUse(threads=1, reason="of 2 cores, because other programs use the CPU", delay=0.31, slowdown=2.3)
    out = io.StringIO()
    row = an_instance(active=1, cpu=busy)
    show(InstanceList(data=[row]), Console(file=out, width=200))
    assert "computes with 1 thread, of 2 cores, because other programs use the CPU" in out.getvalue()
    assert "its threads wait 31% of the time for a core" in out.getvalue()
    assert "CPU is shared: steps take 2.3 times as long as when quiet" in out.getvalue()


def test_a_load_that_fails_is_shown_with_its_reason(tmp_path: Path) -> None:
    with fakes(tmp_path, torn={"fail_load": "the weights are \x1b[31mtorn\nin two"}) as server:
        assert server.complete("torn").status_code == 503
        (row,) = rows(server)
        assert (row["state"], row["slots"], row["devices"], row["deaths"]) == ("Failed", 0, [], 1)
        assert row["last_failure"]["code"] == "model_load_failed"
        shown = ps(server).stdout
        assert "the weights are \\x1b[31mtorn\nin two" in shown
        assert "\x1b" not in shown


def test_it_says_when_a_runner_may_be_started_again() -> None:
    failed = LastFailure(code="runner_died", message="the runner exited with code 1", at=int(time.time()) - 125)
    row = an_instance(state="Failed", deaths=5, last_failure=failed, retry_seconds=7.2)
    shown = io.StringIO()
    show(InstanceList(data=[row]), Console(file=shown, width=200))
    assert "org/model@cuda failed 2 min ago: the runner exited with code 1\n" in shown.getvalue()
    assert shown.getvalue().endswith("it may be started again in 8 s\n")


def test_each_device_is_shown_with_what_is_taken_there_or_kept_until_that_is_known() -> None:
    row = Instance.model_construct(
        model="org/model",
        devices=["CUDA0", "CUDA1"],
        device_memory=[
            DeviceMemory(device="CUDA0", reserved=6_000_000_000, measured=5_120_000_000),
            DeviceMemory(device="CUDA1", reserved=4_000_000_000, measured=None),
        ],
        **dict.fromkeys(("runner", "backend", "state"), "x"),
        **dict.fromkeys(("active", "waiting", "slots", "model_bytes", "pid", "deaths"), 0),
        last_failure=None,
    )
    shown = io.StringIO()
    show(InstanceList.model_construct(data=[row]), Console(file=shown, width=200))
    assert "CUDA0 5.12 GB, CUDA1 4.00 GB" in shown.getvalue()


def test_what_runs_and_what_waits_is_counted(tmp_path: Path) -> None:
    with fakes(tmp_path, busy={"slots": 1, "n_ctx": 1_000_000_000, "step_seconds": 0.001}) as server:
        body = {"model": "busy", "prompt": "x", "stream": True, "ignore_eos": True, "n": 3}
        with server.client.stream("POST", "/v1/completions", json=body) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data: "))
            next(lines)
            (row,) = rows(server)
            assert (row["state"], row["slots"], row["active"], row["waiting"]) == ("Running", 1, 1, 2)
            assert "1/1 busy, 2 wait" in ps(server).stdout
            next(lines)
        until(server, lambda each: each["active"] == 0)
        assert rows(server)[0]["waiting"] == 0


def test_a_load_on_its_way_is_shown(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    with fakes(tmp_path, slow={"load_gate": str(tmp_path / "gate"), "load_steps": 7}) as server:
        body = {"model": "slow", "prompt": "x", "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            until(server, lambda each: each["layers_loaded"] == 6)
            assert "Loading 6/7" in ps(server).stdout
            (tmp_path / "gate").open("wb").close()
            assert "data: [DONE]" in lines


def test_without_a_server_it_says_how_to_get_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    done = run_ps(tmp_path, "--port", str(port))
    assert (done.returncode, done.stdout) == (4, "")
    assert f"no server answers at http://127.0.0.1:{port}" in done.stderr
    assert "exo serve" in done.stderr
    assert "--port" in done.stderr


def test_a_server_with_keys_wants_one_here_too(tmp_path: Path) -> None:
    with ServeProgram(tmp_path, "--api-key", "me:secret-secret") as server:
        done = ps(server)
        assert (done.returncode, done.stdout) == (1, "")
        assert "an API key is needed" in done.stderr
        assert "no model is loaded" in ps(server, "--api-key", "secret-secret").stdout


@pytest.mark.parametrize("answer", [b"hello", b'{"object":"list"}', b"[]"])
def test_another_program_at_the_address_is_told_apart(tmp_path: Path, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "exo", "ps", "--port", port]
        with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as asking:
            client, _ = other.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
            _, said = asking.communicate(timeout=60)
    assert asking.returncode == 1
    assert "is no exo server" in said
