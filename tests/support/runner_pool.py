"""Routes and runners of a pool, and waiting for what they do."""

from collections.abc import Callable
from pathlib import Path

import anyio

from exo.worker.protocol.events import Finished
from exo.worker.router import Route
from exo.worker.supervisor.runner_process import RunnerProcess
from tests.support.program import ask

ANEW = Route(runner="cuda", instance=None, backend="LlamaCppCpu", reason="the tests")


async def pass_gate(gate: Path) -> None:
    await anyio.Path(gate).write_bytes(b"")


async def finishes(process: RunnerProcess, name: str = "one") -> bool:
    async with process.generate(ask(name)) as events:
        return isinstance([event async for event in events][-1], Finished)


async def loading(process: RunnerProcess) -> None:
    while process.status.state != "Loading":
        await process.status_after(process.status)


async def until(condition: Callable[[], bool]) -> None:
    """Asks every few milliseconds, which leaves the processor to the process that is waited for."""
    while not condition():  # noqa: ASYNC110 - most conditions have no event
        await anyio.sleep(0.005)
