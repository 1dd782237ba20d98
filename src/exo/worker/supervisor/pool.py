"""The runner processes of this server, by instance id; each model is loaded once, however many ask for it at once."""

import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, final

import anyio
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync

from exo.cards.card import ModelCard
from exo.worker.protocol.cores import physical_cores, shares
from exo.worker.protocol.messages import Estimated, Failed, Load, LoadOption
from exo.worker.protocol.runners import RUNNERS
from exo.worker.router import LiveRunner, Route
from exo.worker.speed import Measurement
from exo.worker.supervisor.circuit_breaker import CircuitBreaker
from exo.worker.supervisor.host_memory import room, taken
from exo.worker.supervisor.instance import Instance, InstanceReport, Kind, settings_digest
from exo.worker.supervisor.memory import Memory
from exo.worker.supervisor.memory_budget import MemoryBudget
from exo.worker.supervisor.request_timer import RequestCount, RequestTimer
from exo.worker.supervisor.runner_process import RunnerError, RunnerProcess
from exo.worker.supervisor.watchdog import DEADLINES, Deadlines

log = logging.getLogger(__name__)

OnMeasured = Callable[[ModelCard, str, Measurement], None]

_MEASURE_SECONDS = 5.0
"""Between two looks at how much memory the runners have."""


def runner_commands() -> dict[str, tuple[str, ...]]:
    """The command that starts each runner, by runner name."""
    return {name: spec.command for name, spec in RUNNERS.items()}


@final
class RunnerPool:
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
        keep_seconds: float = math.inf,
        on_measured: OnMeasured = lambda _card, _runner, _measurement: None,
        *,
        residence_seconds: float = 0.0,
        evict_seconds: float = math.inf,
    ) -> None:
        """``keep_seconds``: how long a model stays loaded without being used, where its card does not say.

        ``residence_seconds``: how long a model stays loaded that takes turns with another. ``evict_seconds``: how long
        requests may keep others waiting for memory before they are put off.
        ``on_measured`` gets what requests tell of the speed of a runner with the model of a card.
        """
        self._models_directories = tuple(str(directory) for directory in models_directories)
        self._log_directory = log_directory
        self._commands = runner_commands() if commands is None else commands
        self._deadlines = deadlines
        self._instances: dict[str, Instance] = {}
        self._health: defaultdict[Kind, CircuitBreaker] = defaultdict(CircuitBreaker)
        """``_run`` is its only writer. A corrected model card makes another kind, which starts at once."""
        self._last_failed: dict[tuple[str, str], Instance] = {}
        """The instance that failed last, by model id and runner; ``_run`` is its only writer."""
        self._tasks: TaskGroup = anyio.create_task_group()
        self._closed = False
        self._ledger = MemoryBudget(None, residence_seconds, evict_seconds)
        self._device_names: tuple[str, ...] = ()
        self._keep_seconds = keep_seconds
        self._on_measured = on_measured
        self._n_cores = physical_cores()
        self._in_flight = RequestCount()
        """Requests of all runners."""
        self._background = anyio.CancelScope()
        self._changed = anyio.Event()
        self._loaded = anyio.Event()
        """Another runner has loaded, and is to be measured."""

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._look_after)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        with anyio.CancelScope(shield=True):
            await self.close()
            self._background.cancel()
        return await self._tasks.__aexit__(kind, error, trace)

    def acquire(self, route: Route, card: ModelCard) -> RunnerProcess:
        """The process of ``route.instance``, else one of this model and runner, else a new one that starts now.

        An instance that was started by an older version of the card takes no more requests and ends after those that it
        has.

        Does not wait: see ``RunnerProcess.loading`` and ``ready``. A load belongs to no request, so it goes on when the
        request that caused it is gone. A process that has failed is not given out again; the next caller starts
        another. Raises ``RunnerError`` after ``close`` and, with ``retry_seconds``, where it has failed too often.
        """
        if self._closed:
            raise RunnerError(Failed(code="shutdown", message="the server is shutting down"))
        settings = settings_digest(card, route.runner)
        usable = [each for each in self._of(card.model_id, route.runner) if self._takes_requests(each)]
        current = [each for each in usable if each.settings == settings]
        wished = [each for each in current if each.id == route.instance]
        if (instance := next(iter(wished or current), None)) is None:
            self._check_pause((card.model_id, route.runner, settings))
            instance = self._start(route, card, settings)
            for each in usable:
                log.info("%s: the model card has changed; %s ends after its requests", card.model_id, each.id)
                self._ledger.leave(each.id)
            self._settle()
        return instance.process

    @contextmanager
    def using(self, process: RunnerProcess) -> Generator[None]:
        """Keeps a process that ``acquire`` has just given from being unloaded while the context lasts."""
        name = next(each.id for each in self._instances.values() if each.process is process)
        self._ledger.use(name)
        try:
            yield
        finally:
            self._ledger.disuse(name, anyio.current_time())
            self._settle()

    def set_capacity(self, capacity: Memory, device_names: Sequence[str] = ()) -> None:
        """How much memory all runners may take; until this is told, they take what they like.

        ``device_names`` are those of NVIDIA devices, in the driver's order; see ``capacity.taken``. What they have is
        measured again before each load, so a device that is known keeps its capacity here.
        """
        known = (self._ledger.capacity or Memory()).devices
        self._ledger.capacity = Memory(capacity.host, {**capacity.devices, **known})
        self._device_names = tuple(device_names)
        self._settle()

    def keep_alive(self, model_id: str, seconds: float) -> None:
        """How long a model that is loaded, or about to be, stays so without being used, until it is unloaded.

        0: not at all, infinity: for ever. What is pinned stays.
        """
        for instance in self._instances.values():
            entry = self._ledger.entry(instance.id)
            if instance.model_id == model_id and entry is not None and not entry.pinned:
                self._ledger.keep(instance.id, seconds)
        self._settle()

    async def unload(self, model_id: str, seconds: float) -> int:
        """Ends a model's runners, after their requests, which have so many seconds; how many runners it had.

        Whoever asks for the model from now on has it loaded again.
        """
        leaving = [each for each in self._instances.values() if each.model_id == model_id]
        for each in leaving:
            self._ledger.leave(each.id)
        self._settle()
        with anyio.move_on_after(seconds):
            for each in leaving:
                await each.process.ended()
        async with anyio.create_task_group() as tasks:
            for each in leaving:
                tasks.start_soon(each.process.close)
        return len(leaving)

    def avoided(self, card: ModelCard) -> frozenset[str]:
        """The runners that keep failing with this model as its card is now, by name."""
        now = anyio.current_time()
        failing = [kind for kind, each in self._health.items() if kind[0] == card.model_id and each.avoided(now)]
        return frozenset(runner for _, runner, settings in failing if settings == settings_digest(card, runner))

    def live(self) -> tuple[LiveRunner, ...]:
        """Runners that load or serve, and how busy each is."""
        return tuple(each.describe() for each in self._instances.values() if self._takes_requests(each))

    def live_for(self, card: ModelCard) -> tuple[LiveRunner, ...]:
        """What the router may choose from: those of the model that were started by its card as it is now."""
        return tuple(
            each.describe()
            for each in self._instances.values()
            if each.model_id == card.model_id
            and self._takes_requests(each)
            and each.settings == settings_digest(card, each.runner)
        )

    def reports(self) -> tuple[InstanceReport, ...]:
        """Every instance and, of each model and runner that has failed and not worked since, the last one."""
        there = {(each.model_id, each.runner) for each in self._instances.values()}
        failed = [each for which, each in self._last_failed.items() if which not in there]
        return tuple(self._report(each) for each in (*self._instances.values(), *failed))

    def _report(self, instance: Instance) -> InstanceReport:
        return instance.report(anyio.current_time(), self._health[instance.kind], self._ledger.entry(instance.id))

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

    def _check_pause(self, kind: Kind) -> None:
        model_id, runner, _ = kind
        health = self._health[kind]
        seconds = health.pause(anyio.current_time())
        if seconds and health.last is not None:
            message = (
                f"runner {runner} failed {health.failures} times in a row with {model_id} and is started again in "
                f"{math.ceil(seconds)} s; the last time: {health.last.message}"
            )
            raise RunnerError(Failed(code=health.last.code, message=message), seconds)

    def _start(self, route: Route, card: ModelCard, settings: str) -> Instance:
        names = (f"{card.model_id.replace('/', '--')}@{route.runner}-{number}" for number in count(1))
        name = next(each for each in names if each not in self._instances)
        load = Load(
            model_id=card.model_id,
            backend=route.backend,
            table=card.engines.get(route.runner, {}),
            directories=self._models_directories,
            tasks=card.tasks,
        )
        instance = Instance(name, route.runner, card, settings, route.backend, time.time())

        async def admit(estimated: Estimated) -> LoadOption:
            return await self._admit(instance, estimated)

        counted = self._ledger.capacity is not None
        instance.process = RunnerProcess(
            self._commands[route.runner],
            load,
            self._log_directory / f"{name}.log",
            self._deadlines,
            admit if counted else None,
            RequestTimer(self._in_flight, partial(self._on_measured, card, route.runner)),
            self._share_cores,
        )
        others = list(self._of(card.model_id, route.runner))
        # Where memory is counted, an instance with other settings may go on beside this one if there is room for both.
        predecessors = [each.process for each in others if each.settings == settings or not counted]
        self._instances[name] = instance
        keep = math.inf if card.pinned else card.keep_seconds(self._keep_seconds)
        kind = f"{card.model_id}@{route.runner}"
        self._ledger.enter(name, anyio.current_time(), kind=kind, pinned=card.pinned, keep=keep)
        if not counted:
            self._ledger.load(name)
        self._tasks.start_soon(self._run, instance, predecessors)
        return instance

    async def _admit(self, instance: Instance, estimated: Estimated) -> LoadOption:
        """See ``process.Admit``."""
        await self._measure_devices()
        self._ledger.estimate(instance.id, estimated)
        self._settle()
        return await instance.admission()

    def _settle(self) -> None:
        """Does what the account demands. To be called whenever something has changed on it."""
        verdicts = self._ledger.settle(anyio.current_time())
        for name, choice in verdicts.granted.items():
            self._instances[name].decide(choice)
        for name, refusal in verdicts.refused.items():
            instance = self._instances[name]
            message = refusal.message(instance.model_id, instance.runner)
            instance.decide(RunnerError(Failed(code="out_of_memory", message=message)))
        for name in verdicts.unload:
            log.info("%s is unloaded", self._instances[name].model_id)
            self._tasks.start_soon(self._close, self._instances[name])
        for name in verdicts.displace:
            log.info("%s makes room for others, who have waited for its requests; they go on later", name)
            self._instances[name].process.displace("its model was unloaded, because others waited for the memory")
        self._call_off_successors()
        self._changed.set()

    def _call_off_successors(self) -> None:
        """Ends those that wait for an instance to end which stays after all; their requests go back to that."""
        staying = {each.kind for each in self._instances.values() if self._takes_requests(each) and each.process.began}
        for each in self._instances.values():
            if each.kind in staying and not each.process.began:
                each.process.displace("its model stays loaded in another process")

    def _share_cores(self) -> None:
        """Divides the cores among the runners that compute on them at the moment, so that threads need not wait."""
        busy = {
            name: each.process
            for name, each in self._instances.items()
            if each.process.pending and each.process.computes_on_cpu
        }
        for name, share in shares(self._n_cores, busy).items():
            busy[name].share_cores(share)

    async def _look_after(self) -> None:
        """Unloads what has not been used for too long, and looks how much memory the runners have."""
        with self._background:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._measure_now_and_then)
                while True:
                    self._changed = anyio.Event()
                    with anyio.move_on_after(max(0.0, self._ledger.next_expiry() - anyio.current_time())):
                        await self._changed.wait()
                        continue
                    self._settle()

    async def _measure_now_and_then(self) -> None:
        while True:
            with anyio.move_on_after(_MEASURE_SECONDS):
                await self._loaded.wait()
            self._loaded = anyio.Event()
            if self._ledger.waits:
                await self._measure_devices()
                self._settle()
            loaded = [each for each in self._ledger if each.state == "loaded"]
            by_pid = {pid: each for each in loaded if (pid := self._instances[each.name].process.pid) is not None}
            if by_pid:
                try:
                    found = await run_sync(taken, list(by_pid), self._device_names, abandon_on_cancel=True)
                except Exception:
                    log.exception("the memory of the runners could not be measured")
                    continue
                for pid, amount in found.items():
                    if self._ledger.entry(by_pid[pid].name) is by_pid[pid]:
                        self._ledger.measure(by_pid[pid].name, amount.host, amount.devices)
                self._settle()

    async def _measure_devices(self) -> None:
        """Other programs take and free memory on devices; what is left for the runners is their capacity."""
        capacity = self._ledger.capacity
        if capacity is None or not any(self._device_names):
            return
        holders: dict[int, tuple[str, ...]] = {}
        for each in self._instances.values():
            entry = self._ledger.entry(each.id)
            if each.process.pid is not None and entry is not None:
                holders[each.process.pid] = tuple(entry.reserved.devices)
        try:
            found = await run_sync(room, self._device_names, holders, abandon_on_cancel=True)
        except Exception:
            log.exception("the free memory of the devices could not be measured")
            return
        devices = {name: found.get(name, size) for name, size in capacity.devices.items()}
        self._ledger.capacity = Memory(capacity.host, devices)

    def _takes_requests(self, instance: Instance) -> bool:
        entry = self._ledger.entry(instance.id)
        return instance.usable and entry is not None and not entry.leaving

    async def _close(self, instance: Instance) -> None:
        try:
            await instance.process.close()
        except Exception:
            log.exception("%s could not be asked to end and is killed", instance.id)
            instance.process.kill()

    async def _run(self, instance: Instance, predecessors: Sequence[RunnerProcess]) -> None:
        """The life of an instance. What goes wrong in it ends this instance and no other."""
        process, health = instance.process, self._health[instance.kind]

        async def recover() -> None:
            await process.produced_output.wait()
            health.worked()
            self._last_failed.pop((instance.model_id, instance.runner), None)

        async def count() -> None:
            with suppress(RunnerError):
                await process.ready()
                self._ledger.loaded(instance.id, anyio.current_time())
                self._loaded.set()
                self._settle()

        def note(failed: Failed) -> None:
            if process.produced_output.is_set():
                health.worked()
            if failed.code != "shutdown" and not process.refused and not process.displaced:
                self._last_failed[instance.model_id, instance.runner] = instance
                told_why = process.capabilities is None and failed.code != "runner_died"
                health.failed(failed, anyio.current_time(), random.random(), lasting=told_why)

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(recover)
                tasks.start_soon(count)
                await process.run(after=predecessors, on_end=note)
                tasks.cancel_scope.cancel()
        except Exception:
            log.exception("%s has ended by a mistake of the server's own", instance.id)
        finally:
            del self._instances[instance.id]
            self._ledger.release(instance.id)
            self._settle()

    def _of(self, model_id: str, runner: str) -> Iterator[Instance]:
        return (each for each in self._instances.values() if (each.model_id, each.runner) == (model_id, runner))
