"""The runner processes of this server. Each model is loaded once, however many requests ask for it."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, final

import anyio
from anyio.abc import TaskGroup

from exo.cards.card import ModelCard
from exo.worker.protocol.cores import CPU_BACKENDS, physical_cores, shares
from exo.worker.protocol.events import Estimated, Failed
from exo.worker.protocol.remote_host import RemoteHost, account, host_of
from exo.worker.protocol.runners import runner_commands
from exo.worker.router import LiveRunner, Route
from exo.worker.speed import Measurement
from exo.worker.supervisor.dry_run import dry_run
from exo.worker.supervisor.history import RunnerHistory
from exo.worker.supervisor.instance import InstanceReport, RunnerInstance, settings_digest
from exo.worker.supervisor.live_hosts import LiveHosts
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import HOST, Memory
from exo.worker.supervisor.memory.meter import MemoryMeter
from exo.worker.supervisor.model_load import Admission
from exo.worker.supervisor.placement_plan import PlacementPlan
from exo.worker.supervisor.request_timer import RequestCount, RequestTimer
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.runner_process import RunnerProcess
from exo.worker.supervisor.watchdog import DEADLINES, Deadlines

if TYPE_CHECKING:  # few servers have other hosts
    from exo.worker.supervisor.node_messages import HostFound, HostUsage

log = logging.getLogger(__name__)

OnMeasured = Callable[[ModelCard, str, Measurement], None]


@final
class RunnerPool:
    """An asynchronous context. Leaving it ends every runner."""

    def __init__(
        self,
        models_directories: Sequence[Path],
        log_directory: Path,
        commands: Mapping[str, Sequence[str]] | None = None,
        deadlines: Deadlines = DEADLINES,
        keep_seconds: float = math.inf,
        on_measured: OnMeasured = lambda _card, _runner, _measurement: None,
        *,
        hosts: Sequence[RemoteHost] = (),
        prefix_directory: Path | None = None,
        residence_seconds: float = 0.0,
        evict_seconds: float = math.inf,
        force_load: bool = False,
    ) -> None:
        """``models_directories`` are passed to the runners. ``commands``, by runner name, default to the real runners.

        ``hosts`` are other machines; they get runners while ``host_up`` says that they are there. Runners may keep
        computed prefixes in ``prefix_directory``.

        ``keep_seconds``: how long an unused model stays loaded, unless its card sets that. ``residence_seconds``: how
        long a model stays loaded that alternates with another one. ``evict_seconds``: how long a runner's requests may
        keep others waiting for its memory. ``force_load``: models that do not fit by their estimate are loaded anyway,
        as those are whose card says so. ``on_measured`` gets each measurement of a runner's speed with a card.
        """
        commands = runner_commands() if commands is None else commands
        prefixes = "" if prefix_directory is None else str(prefix_directory)
        self.hosts = LiveHosts(hosts, commands, tuple(map(str, models_directories)), prefixes)
        self.history = RunnerHistory()
        self._log_directory = log_directory
        self._deadlines = deadlines
        self._keep_seconds = keep_seconds
        self._on_measured = on_measured
        self._force_load = force_load
        self._instances: dict[str, RunnerInstance] = {}
        self._budget = MemoryBudget(None, residence_seconds, evict_seconds)
        self._meter = MemoryMeter(self._budget, self._local_pid)
        self._n_cores = physical_cores()
        self._planning = anyio.Lock()  # one process at a time
        self._in_flight = RequestCount()  # the requests of all runners
        self._tasks: TaskGroup  # these two exist once the context is entered
        self._background: anyio.CancelScope
        self._changed = anyio.Event()  # the budget's next expiry may have changed
        self._closed = False

    async def __aenter__(self) -> Self:
        self._background = anyio.CancelScope()
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._maintain)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        with anyio.CancelScope(shield=True):
            await self.close()
            self._background.cancel()
        return await self._tasks.__aexit__(kind, error, trace)

    def acquire(self, route: Route, card: ModelCard) -> RunnerProcess:
        """The process of ``route.instance``, else one of this model and runner, else a new one, which starts now.

        Never waits: see ``RunnerProcess.loading`` and ``ready``. A load belongs to no request, so it continues when the
        request that caused it is gone. A failed process is not given out again. An instance that an older version of
        the card started gets no new requests, and ends after those it has. Raises ``RunnerError`` after ``close`` and,
        with ``retry_seconds``, after too many failures.
        """
        if self._closed:
            raise RunnerError(Failed(code="shutdown", message="the server is shutting down"))
        settings = settings_digest(card, route.runner)
        usable = [each for each in self._usable() if (each.model_id, each.runner) == (card.model_id, route.runner)]
        current = [each for each in usable if each.settings == settings and each.host == route.host]
        wished = [each for each in current if each.id == route.instance]
        if (instance := next(iter(wished or current), None)) is None:
            self.history.check_pause((card.model_id, route.place, settings))
            instance = self._start(route, card, settings)
            for each in [each for each in usable if each.settings != settings]:
                log.info("%s: the model card has changed; %s ends after its requests", card.model_id, each.id)
                self._budget.dismiss(each.id)
            self._settle()
        return instance.process

    @contextmanager
    def using(self, process: RunnerProcess) -> Generator[str]:
        """Keeps a process that ``acquire`` has just returned from being unloaded. Yields its instance's name."""
        name = next(each.id for each in self._instances.values() if each.process is process)
        self._budget.begin_use(name)
        try:
            yield name
        finally:
            self._budget.end_use(name, anyio.current_time())
            self._settle()

    def set_capacity(self, capacity: Memory, device_names: Sequence[str] = (), *, ram_is_fixed: bool = False) -> None:
        """Sets the memory that all runners may take. Until then it is unlimited.

        ``device_names`` are the NVIDIA devices in the driver's order, see ``host_memory.memory_of``. A known device
        keeps its capacity here, because it is measured again before each load. The RAM is measured, too, unless it
        is fixed, but never counts for more than here.
        """
        self._meter.set_capacity(capacity, device_names, ram_is_fixed=ram_is_fixed)
        self._count_hosts()

    def host_up(self, name: str, found: "HostFound") -> None:
        """A remote host can be used, or has been probed again."""
        self.hosts.add(name, found)
        self._count_hosts()

    def host_usage(self, name: str, usage: "HostUsage") -> None:
        """The memory of a remote host has been measured."""
        there = [each for each in self._budget if self._instances[each.name].host == name]
        reserved = {each.name: each.reserved for each in self._budget}
        loaded = {each.name for each in there if each.state == "loaded"}
        for instance, sizes in self.hosts.up[name].update(usage, reserved, loaded).items():
            self._budget.measure(instance, 0, sizes)
        self._count_hosts()

    def host_down(self, name: str, why: str) -> None:
        """A remote host is lost. The requests of every runner that has anything there continue elsewhere."""
        self.hosts.remove(name)
        self._count_hosts()
        for each in [*self._instances.values()]:
            if each.uses(name, self._budget.reservation(each.id)):
                each.process.displace(f"host {name} {why}")

    def _count_hosts(self) -> None:
        """The memory of other hosts has changed."""
        if self._budget.capacity is not None:
            self._budget.capacity = self.hosts.beside(self._budget.capacity)
            self._settle()

    def has_room(self, card: ModelCard, backend: str, host: str) -> bool:
        """Whether a model's weights fit beside the loaded ones, by the size that its card states."""
        if self._budget.capacity is None:
            return True
        free = self._budget.free
        ram = free.devices.get(account(host, HOST), 0) if host else free.host
        devices = [size for name, size in free.devices.items() if host_of(name) == host and name != account(host, HOST)]
        room = sum(max(0, size) for size in devices) if devices and backend not in CPU_BACKENDS else ram
        return room >= card.storage_size.in_bytes

    def keep_alive(self, model_id: str, seconds: float) -> None:
        """Sets how long a model stays loaded without being used: 0 not at all, infinity for ever.

        A pinned model stays.
        """
        for instance in self._instances.values():
            reservation = self._budget.reservation(instance.id)
            if instance.model_id == model_id and reservation is not None and not reservation.pinned:
                self._budget.keep(instance.id, seconds)
        self._settle()

    async def unload(self, model_id: str, seconds: float, runner: str | None = None) -> int:
        """Ends a model's runners, or one kind of them, and returns their number. Forgets those that have failed.

        Their requests have ``seconds`` to finish. A new request for the model loads it again.
        """
        leaving = [
            each for each in self._instances.values() if each.model_id == model_id and runner in (None, each.runner)
        ]
        self.history.forget(model_id, runner)
        for each in leaving:
            self._budget.dismiss(each.id)
        self._settle()
        with anyio.move_on_after(seconds):
            for each in leaving:
                await each.process.ended()
        async with anyio.create_task_group() as tasks:
            for each in leaving:
                tasks.start_soon(each.process.close)
        return len(leaving)

    def live(self) -> tuple[LiveRunner, ...]:
        """The runners that load or serve."""
        return tuple(each.describe() for each in self._usable())

    def slots(self, model_id: str) -> int:
        """The number of sequences of a model that its runners serve at once; 0 if none has loaded."""
        return sum(each.slots for each in self.live() if each.model_id == model_id)

    def live_for(self, card: ModelCard) -> tuple[LiveRunner, ...]:
        """The live runners that this version of the card started, for the router."""
        return tuple(
            each.describe()
            for each in self._usable()
            if each.model_id == card.model_id and each.settings == settings_digest(card, each.runner)
        )

    async def plan(self, route: Route, card: ModelCard) -> PlacementPlan | None:
        """How the route's instance is loaded or, if it has none, how the model would be loaded with no other one.

        None where memory is not counted, and without the model's files.
        """
        if (instance := self._instances.get(route.instance or "")) is not None:
            return instance.plan
        if self._budget.capacity is None or self._closed:
            return None
        command, capacity = self.hosts.command(route.runner, route.host), self._budget.capacity
        try:
            load = self.hosts.load(route, card)
        except RunnerError as error:
            return PlacementPlan(problem=error.failed.message)
        async with self._planning:
            there = remote.estimate if (remote := self.hosts.up.get(route.host)) is not None else None
            return await dry_run(command, load, route.runner, capacity, there, forced=self._is_forced(card))

    def reports(self) -> tuple[InstanceReport, ...]:
        """Every instance, and the last failed one of each model and place that has not worked since."""
        instances, now = self._instances.values(), anyio.current_time()
        return tuple(
            each.report(now, self.history.breakers[each.kind], self._budget.reservation(each.id), self.hosts.pid(each))
            for each in (*instances, *self.history.failed_before(instances))
        )

    async def close(self) -> None:
        """Ends all runners at once. Returns when every process is reaped. Idempotent."""
        self._closed = True
        async with anyio.create_task_group() as tasks:
            for each in self._instances.values():
                tasks.start_soon(each.process.close)

    def kill(self) -> None:
        """Kills all runners, so that ``close`` need not wait."""
        self._closed = True
        for each in self._instances.values():
            each.process.kill()

    def _local_pid(self, name: str) -> int | None:
        instance = self._instances[name]
        return None if instance.host else instance.process.pid

    def _start(self, route: Route, card: ModelCard, settings: str) -> RunnerInstance:
        where = f"{route.runner}.{route.host}" if route.host else route.runner
        names = (f"{card.model_id.replace('/', '--')}@{where}-{number}" for number in count(1))
        name = next(each for each in names if each not in self._instances)
        load = self.hosts.load(route, card, name)
        peers = tuple(each.name for each in load.peers)
        instance = RunnerInstance(name, route.runner, card, settings, route.backend, time.time(), route.host, peers)
        counted = self._budget.capacity is not None

        def on_measured(measurement: Measurement) -> None:
            if not route.host:  # speeds are compared on this machine only
                self._on_measured(card, route.runner, measurement)

        instance.process = RunnerProcess(
            self.hosts.command(route.runner, route.host, name),
            load,
            self._log_directory / f"{name}.log",
            self._deadlines,
            partial(self._admit, instance) if counted else None,
            RequestTimer(self._in_flight, on_measured),
            self._share_cores,
        )
        others = [each for each in self._instances.values() if each.kind[:2] == (card.model_id, route.place)]
        # Where memory is counted, an instance with other settings may run beside this one if there is room for both.
        predecessors = [each.process for each in others if each.settings == settings or not counted]
        self._instances[name] = instance
        keep = math.inf if card.pinned else card.keep_seconds(self._keep_seconds)
        kind = f"{card.model_id}@{route.runner}"
        forced = self._is_forced(card)
        self._budget.enter(name, anyio.current_time(), kind=kind, pinned=card.pinned, keep=keep, forced=forced)
        if not counted:
            self._budget.load(name)
        self._tasks.start_soon(self._run, instance, predecessors)
        return instance

    def _is_forced(self, card: ModelCard) -> bool:
        """Whether the model is loaded even if it does not fit."""
        return self._force_load or card.force_load

    async def _admit(self, instance: RunnerInstance, estimated: Estimated) -> Admission:
        """See ``model_load.Admit``."""
        await self._meter.measure_free()
        if (remote := self.hosts.up.get(instance.host)) is not None:
            estimated = remote.estimate(estimated)
        self._budget.estimate(instance.id, estimated)
        self._settle()
        decision = await asyncio.shield(instance.decision)  # if the process dies meanwhile, the budget may still decide
        if isinstance(decision, RunnerError):
            raise decision
        return Admission(*instance.grant(estimated, decision, self._budget))

    def _settle(self) -> None:
        """Does what the memory budget decides. Call it after every change of the budget."""
        actions = self._budget.settle(anyio.current_time())
        for name, option in actions.granted.items():
            self._instances[name].decision.set_result(option)
        for name, refusal in actions.refused.items():
            instance = self._instances[name]
            message = refusal.message(instance.model_id, instance.runner)
            instance.decision.set_result(RunnerError(Failed(code="out_of_memory", message=message)))
            if self.hosts.divide(instance):
                instance.process.displace(message)
        for name in (*actions.unload, *actions.displace):
            reservation = self._budget.reservation(name)
            if reservation is not None and reservation.evicting is not None and not reservation.dismissed:
                self.history.totals[self._instances[name].labels].evictions += 1
        for name in actions.unload:
            log.info("%s is unloaded", self._instances[name].model_id)
            self._tasks.start_soon(self._close, self._instances[name])
        for name in actions.displace:
            log.info("%s is unloaded while it is in use: others have waited for its memory; its requests wait", name)
            self._instances[name].process.displace("its model was unloaded, because others waited for the memory")
        self._cancel_successors()
        self._changed.set()

    def _cancel_successors(self) -> None:
        """Ends processes that wait for a predecessor's end when the predecessor stays; it gets their requests back."""
        staying = {each.kind for each in self._usable() if each.process.began}
        for each in self._instances.values():
            if each.kind in staying and not each.process.began:
                each.process.displace("its model stays loaded in another process")

    def _share_cores(self) -> None:
        """Divides the cores among the runners that compute on them now, so that their threads do not contend."""
        busy = {
            name: each.process
            for name, each in self._instances.items()
            if each.process.pending and each.process.computes_on_cpu and not each.host
        }
        for name, share in shares(self._n_cores, busy).items():
            busy[name].share_cores(share)

    async def _maintain(self) -> None:
        """Settles the budget when time alone changes it, and measures the runners."""
        with self._background:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._meter.run, self._settle)
                while True:
                    self._changed = anyio.Event()
                    with anyio.move_on_after(max(0.0, self._budget.next_expiry() - anyio.current_time())):
                        await self._changed.wait()
                        continue
                    self._settle()

    def _usable(self) -> Iterator[RunnerInstance]:
        """The instances that take requests."""
        for each in self._instances.values():
            reservation = self._budget.reservation(each.id)
            if each.usable and reservation is not None and not reservation.leaving:
                yield each

    async def _close(self, instance: RunnerInstance) -> None:
        try:
            await instance.process.close()
        except Exception:
            log.exception("%s could not be shut down and is killed", instance.id)
            instance.process.kill()

    async def _run(self, instance: RunnerInstance, predecessors: Sequence[RunnerProcess]) -> None:
        """An instance's life. An error in it ends no other instance."""
        process, history = instance.process, self.history

        async def note_output() -> None:
            await process.produced_output.wait()
            history.worked(instance)

        async def note_load() -> None:
            with suppress(RunnerError):
                capabilities = await process.ready()
                if capabilities.retried:
                    instance.shrink(self._budget)
                self._budget.loaded(instance.id, anyio.current_time())
                history.totals[instance.labels].note_load(time.time() - instance.started)
                self._meter.runner_loaded()
                self._settle()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(note_output)
                tasks.start_soon(note_load)
                await process.run(after=predecessors, on_end=partial(history.ended, instance))
                tasks.cancel_scope.cancel()
        except Exception:
            log.exception("%s has ended by an error of the server", instance.id)
        finally:
            if process.prefixes is not None:
                history.totals[instance.labels].note_prefixes(process.prefixes)
            del self._instances[instance.id]
            self._budget.release(instance.id)
            self._settle()
