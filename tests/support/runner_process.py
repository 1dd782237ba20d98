"""A runner's process without a pool: started, asked, and what it answers."""

import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Capabilities, Delta, Failed, Finished, Heartbeat, Status
from exo.worker.protocol.wire import encode
from exo.worker.supervisor.runner_process import RunnerProcess
from exo.worker.supervisor.state_machine import RequestEvent, RequestEvents
from exo.worker.supervisor.watchdog import Deadlines
from tests.support.fake_runner import COMMAND
from tests.support.program import DEADLINE_SECONDS, ask

PROMPT = "once upon a time"
PATIENT = Deadlines(grace=10)

IDLE = encode(Status(state="Idle"))
IDLE_BEAT = encode(Heartbeat(steps=7, active=0, waiting=0))
LOADING = encode(Status(state="Loading"))
LOADED = encode(Status(state="Loaded"))
CAPABILITIES = Capabilities(engine="x", engine_version="1", backend="x", context_length=9, slots=1, vocabulary=9)
READY = encode(Status(state="Ready", capabilities=CAPABILITIES))
RUNNING = encode(Status(state="Running"))


@asynccontextmanager
async def running(process: RunnerProcess) -> AsyncGenerator[RunnerProcess]:
    """Runs a process that has not begun. It leaves no child."""
    with anyio.fail_after(DEADLINE_SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.run)
            yield process
            await process.close()
    assert psutil.Process().children(recursive=True) == []


@asynccontextmanager
async def started(
    log: Path, command: Sequence[str] = COMMAND, deadlines: Deadlines = PATIENT, **table: JsonValue
) -> AsyncGenerator[RunnerProcess]:
    load = Load(model_id="fake/model", backend="LlamaCppCpu", table=table)
    async with running(RunnerProcess(command, load, log, deadlines)) as process:
        yield process


@asynccontextmanager
async def ready(log: Path, **table: JsonValue) -> AsyncGenerator[RunnerProcess]:
    async with started(log, COMMAND, PATIENT, **table) as process:
        await process.ready()
        yield process


def child() -> psutil.Process:
    (found,) = psutil.Process().children()
    return found


async def collect(events: RequestEvents) -> list[RequestEvent]:
    return [event async for event in events]


async def answer(process: RunnerProcess, name: str, prompt: str = PROMPT, max_tokens: int | None = 16) -> str:
    async with process.generate(ask(name, prompt, max_tokens=max_tokens)) as events:
        received = await collect(events)
    assert isinstance(received[-1], Finished), received[-1]
    return text_of(received)


async def failure(process: RunnerProcess, name: str) -> Failed:
    """How an endless request ends."""
    async with process.generate(ask(name, max_tokens=None)) as events:
        *_, last = await collect(events)
    assert isinstance(last, Failed)
    return last


async def first_text(events: RequestEvents) -> str:
    """Reads as far as the first text, so that what follows falls within the stream."""
    async for event in events:
        if isinstance(event, Delta) and event.text:
            return event.text
    pytest.fail("the stream has ended")


def text_of(events: Sequence[RequestEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta | Finished))


def script(source: str) -> tuple[str, ...]:
    return (sys.executable, "-c", source)


def says(*lines: bytes, then: str = "sys.stdin.read()") -> tuple[str, ...]:
    """A program that says this at once, whatever it is told."""
    return script(f"import sys, os\nsys.stdout.buffer.write({b''.join(lines)!r})\nsys.stdout.flush()\n{then}")


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines()
