"""Sandboxes, with a program that is late, dies, or takes what it must not, as told."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
import pytest
from anyio.abc import TaskGroup

from exo.chat import sandbox_pool
from exo.chat.sandbox_pool import PROCESSES, SandboxBusyError, SandboxPool, SandboxProcess
from exo.worker.runner_common.sandbox import Sandbox, SandboxError, SandboxLimits

PROGRAM = "tests.support.limited_program"


def limits(seconds: float = 60) -> SandboxLimits:
    """The owner's. The program has its own ``seconds``, which come into force one second later."""
    return SandboxLimits(seconds=seconds, address_space=0, answer_bytes=4096, cpu_seconds=0.5)


@asynccontextmanager
async def limited(seconds: float = 60) -> AsyncGenerator[SandboxProcess]:
    process = SandboxProcess(PROGRAM, limits(seconds))
    try:
        yield process
    finally:
        await process.aclose()


async def pid_of(process: SandboxProcess) -> int:
    """Asks, so that there is one."""
    return int((await process.ask({"do": "nothing"}))["pid"])


def is_gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


async def test_one_process_answers_one_after_the_other() -> None:
    async with limited() as process:
        pids: set[str] = set()

        async def ask(text: str) -> None:
            answer = await process.ask({"do": "nothing", "text": text})
            assert answer["text"] == text
            pids.add(answer["pid"])

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(ask, f"é\n{number}")
        (pid,) = pids
    assert is_gone(int(pid))


FAULTS = [
    ("hang", 0.2, "took longer than 0.2 s"),
    ("compute", 60, "took longer than 0.5 s"),
    ("die", 60, "ended the process"),
    ("be long", 60, "gave an answer of more than 4096 bytes"),
    ("take memory", 60, "ended the process"),
]
"""What the process does, its deadline in seconds, and the error."""


@pytest.mark.parametrize(("do", "seconds", "says"), FAULTS)
async def test_a_process_that_fails_is_an_error_and_another_takes_over(do: str, seconds: float, says: str) -> None:
    async with limited(seconds) as process:
        before = await pid_of(process)
        with pytest.raises(SandboxError, match=says):
            await process.ask({"do": do})
        assert is_gone(before)
        assert await pid_of(process) != before


@pytest.mark.parametrize(("do", "seconds", "says"), FAULTS)
def test_one_that_a_thread_drives_fails_alike_and_gets_its_setup_again(do: str, seconds: float, says: str) -> None:
    with Sandbox(PROGRAM, limits(seconds), {"text": "é\n"}) as sandbox:
        before = sandbox.ask({"do": "tell the setup"})
        with pytest.raises(SandboxError, match=says):
            sandbox.ask({"do": do})
        assert is_gone(int(before["pid"]))
        after = sandbox.ask({"do": "tell the setup"})
        assert before["text"] == after["text"] == "é\n"
        assert before["pid"] != after["pid"]
        os.kill(int(after["pid"]), signal.SIGKILL)
        with suppress(SandboxError):
            sandbox.ask({"do": "nothing"})
        last = sandbox.ask({"do": "nothing"})["pid"]
    assert is_gone(int(last))


async def test_one_that_was_killed_between_two_questions_is_replaced_at_the_second_next() -> None:
    async with limited() as process:
        os.kill(await pid_of(process), signal.SIGKILL)
        with suppress(SandboxError):
            await process.ask({"do": "nothing"})
        assert await pid_of(process)


async def test_an_answer_that_nobody_waits_for_is_not_the_next_ones(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with limited() as process:
        before = await pid_of(process)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.ask, {"do": "wait", "fifo": str(fifo), "text": "late"})
            await anyio.to_thread.run_sync(fifo.read_bytes)  # until it has the question
            tasks.cancel_scope.cancel()
        assert (await process.ask({"do": "nothing", "text": "own"}))["text"] == "own"
        assert is_gone(before)


async def test_who_waits_for_a_turn_may_leave(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with limited(1) as process:
        first = process.ask({"do": "wait", "fifo": str(fifo)})

        async def hangs() -> None:
            with pytest.raises(SandboxError):
                await first

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hangs)
            await anyio.to_thread.run_sync(fifo.read_bytes)
            with anyio.move_on_after(0.01) as gone:
                await process.ask({"do": "nothing"})
            assert gone.cancelled_caught
            assert (await process.ask({"do": "nothing", "text": "own"}))["text"] == "own"


async def test_it_knows_nothing_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    async with limited() as process:
        names = (await process.ask({"do": "tell the environment"}))["text"].split()
        assert "PYTHONPATH" in names
        assert "HF_TOKEN" not in names


async def test_it_may_write_no_file(tmp_path: Path) -> None:
    async with limited() as process:
        with pytest.raises(SandboxError, match="ended the process"):
            await process.ask({"do": "write", "file": str(tmp_path / "canary")})
    assert (tmp_path / "canary").read_bytes() == b""


def test_the_program_ends_by_itself_where_its_owner_does_not_end_it() -> None:
    requests = b"{}\n" + b"".join(json.dumps({"do": do}).encode() + b"\n" for do in ("nothing", "hang"))
    command = [sys.executable, "-m", PROGRAM]
    done = subprocess.run(command, input=requests, capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGALRM
    up, answer = done.stdout.splitlines()
    assert json.loads(up) == {}
    assert json.loads(answer)["pid"]


async def test_work_goes_on_beside_slow_work_and_waits_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_pool, "TURN_SECONDS", 0.2)
    processes = SandboxPool(PROGRAM, limits())

    async def start_slow_work(tasks: TaskGroup, number: int) -> None:
        fifo = tmp_path / f"fifo-{number}"
        os.mkfifo(fifo)
        tasks.start_soon(processes.ask, {"do": "wait", "fifo": str(fifo)})
        await anyio.to_thread.run_sync(fifo.read_bytes)  # until it has the question

    async with anyio.create_task_group() as tasks:
        for number in range(PROCESSES - 1):
            await start_slow_work(tasks, number)
            answers = [await processes.ask({"do": "nothing"}) for _ in range(2)]
            assert answers[0]["pid"] == answers[1]["pid"]
        await start_slow_work(tasks, PROCESSES)
        with pytest.raises(SandboxBusyError, match="no process was free to work on it within"):
            await processes.ask({"do": "nothing"})
        tasks.cancel_scope.cancel()
    assert (await processes.ask({"do": "nothing", "text": "own"}))["text"] == "own"
    await processes.aclose()
