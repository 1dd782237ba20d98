"""The runner processes of this server, by instance id; each model is loaded once, however many ask for it at once."""

import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, final

import anyio
from anyio.abc import TaskGroup

from exo.models.card import ModelCard
from exo.worker.health import Health
from exo.worker.messages import Failed, Load
from exo.worker.process import DEADLINES, ENDINGS, Deadlines, RunnerError, RunnerProcess
from exo.worker.router import LiveRunner, Route
from exo.worker.runners import RUNNERS


def runner_commands() -> dict[str, tuple[str, ...]]:
    """The command that starts each runner, by runner name."""
    return {name: (sys.executable, "-m", spec.module) for name, spec in RUNNERS.items()}


@dataclass(frozen=True, slots=True)
class _Instance:
    id: str
    runner: str
    model_id: str
    process: RunnerProcess

    @property
    def usable(self) -> bool:
        return self.process.status.state not in ENDINGS


@final
class Instances:
    """An asynchronous context: leaving it ends every runner.

    ``models_directories`` are handed to the runners; each instance has its log in ``log_directory``. ``commands`` are
    by runner name and default to ``runner_commands()``.
    """

    def __init__(
        self,
        models_directories: Sequence[Path],
        log_directory: Path,
        commands: Mapping[str, Sequence[str]] | None = None,
        deadlines: Deadlines = DEADLINES,
    ) -> None:
        self._models_directories = tuple(str(directory) for directory in models_directories)
        self._log_directory = log_directory
        self._commands = runner_commands() if commands is None else commands
        self._deadlines = deadlines
        self._instances: dict[str, _Instance] = {}
        self._health: defaultdict[tuple[str, str], Health] = defaultdict(Health)
        """By model id and runner; ``_run`` is its only writer."""
        self._tasks: TaskGroup = anyio.create_task_group()
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        with anyio.CancelScope(shield=True):
            await self.close()
        return await self._tasks.__aexit__(kind, error, trace)

    def acquire(self, route: Route, card: ModelCard) -> RunnerProcess:
        """The process of ``route.instance``, else one of this model and runner, else a new one that starts now.

        Does not wait: see ``RunnerProcess.loading`` and ``ready``. A load belongs to no request, so it goes on when the
        request that caused it is gone. A process that has failed is not given out again; the next caller starts
        another. Raises ``RunnerError`` after ``close`` and, with ``retry_seconds``, where it has failed too often.
        """
        if self._closed:
            raise RunnerError(Failed(code="shutdown", message="the server is shutting down"))
        usable = [each for each in self._of(card.model_id, route.runner) if each.usable]
        wished = [each for each in usable if each.id == route.instance]
        if (instance := next(iter(wished or usable), None)) is None:
            self._check_pause(card.model_id, route.runner)
            instance = self._start(route, card)
        return instance.process

    def avoided(self, model_id: str) -> frozenset[str]:
        """The runners that keep failing with this model, by name."""
        now = anyio.current_time()
        return frozenset(
            runner for (model, runner), each in self._health.items() if model == model_id and each.avoided(now)
        )

    def live(self) -> tuple[LiveRunner, ...]:
        """What the router may choose from: runners that load or serve, and how busy each is."""
        return tuple(_describe(each) for each in self._instances.values() if each.usable)

    async def close(self) -> None:
        """Ends all runners at once; returns when every process is reaped. Idempotent."""
        self._closed = True
        async with anyio.create_task_group() as tasks:
            for each in self._instances.values():
                tasks.start_soon(each.process.close)

    def kill(self) -> None:
        """Ends all runners without asking them; ``close`` then need not wait."""
        self._closed = True
        for each in self._instances.values():
            each.process.kill()

    def _check_pause(self, model_id: str, runner: str) -> None:
        health = self._health[model_id, runner]
        seconds = health.pause(anyio.current_time())
        if seconds and health.last is not None:
            message = (
                f"runner {runner} failed {health.failures} times in a row with {model_id} and is started again in "
                f"{math.ceil(seconds)} s; the last time: {health.last.message}"
            )
            raise RunnerError(Failed(code=health.last.code, message=message), seconds)

    def _start(self, route: Route, card: ModelCard) -> _Instance:
        names = (f"{card.model_id.replace('/', '--')}@{route.runner}-{number}" for number in count(1))
        name = next(each for each in names if each not in self._instances)
        load = Load(
            model_id=card.model_id,
            backend=route.backend,
            table=card.engines.get(route.runner, {}),
            directories=self._models_directories,
        )
        process = RunnerProcess(
            self._commands[route.runner], load, self._log_directory / f"{name}.log", self._deadlines
        )
        predecessors = [each.process for each in self._of(card.model_id, route.runner)]
        self._instances[name] = instance = _Instance(name, route.runner, card.model_id, process)
        self._tasks.start_soon(self._run, instance, predecessors)
        return instance

    async def _run(self, instance: _Instance, predecessors: Sequence[RunnerProcess]) -> None:
        process, health = instance.process, self._health[instance.model_id, instance.runner]

        async def recover() -> None:
            await process.proven.wait()
            health.worked()

        def note(failed: Failed) -> None:
            if process.proven.is_set():
                health.worked()
            if failed.code != "shutdown":
                health.failed(failed, anyio.current_time(), random.random())

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(recover)
                await process.run(after=predecessors, on_end=note)
                tasks.cancel_scope.cancel()
        finally:
            del self._instances[instance.id]

    def _of(self, model_id: str, runner: str) -> Iterator[_Instance]:
        return (each for each in self._instances.values() if (each.model_id, each.runner) == (model_id, runner))


def _describe(instance: _Instance) -> LiveRunner:
    process = instance.process
    slots = process.capabilities.slots if process.capabilities else 0
    active = min(process.pending, slots)
    return LiveRunner(
        runner=instance.runner,
        instance=instance.id,
        model_id=instance.model_id,
        state=process.status.state,
        slots=slots,
        active=active,
        waiting=process.pending - active,
        capabilities=process.capabilities,
    )
