"""One runner process of this server, with the model card that started it."""

import asyncio
import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exo.cards.card import ModelCard
from exo.worker.protocol.events import CpuUse, Estimated, Failed, LoadOption, PrefixUse, Status
from exo.worker.protocol.remote_host import host_of
from exo.worker.router import LiveRunner, place
from exo.worker.supervisor.circuit_breaker import CircuitBreaker
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.memory.reservation import Reservation
from exo.worker.supervisor.placement_plan import PlacementPlan
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.state_machine import ENDINGS

if TYPE_CHECKING:
    from exo.worker.supervisor.memory.budget import MemoryBudget
    from exo.worker.supervisor.runner_process import RunnerProcess

log = logging.getLogger(__name__)


def settings_digest(card: ModelCard, runner: str) -> str:
    """Identifies the settings with which a runner loads a card's model. An edit of the card changes it."""
    divided = [] if card.divide == "auto" else [card.divide]
    settings = json.dumps([card.engines.get(runner, {}), card.tasks, *divided], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance, for the operator. Times are in seconds since 1970."""

    now: LiveRunner
    card: ModelCard
    """The card that started it."""
    status: Status
    backend: str
    settings: str
    """See ``settings_digest``."""
    pid: int | None
    """None before the process starts and after it ends."""
    started: float
    deaths: int
    """Failed processes of this runner, with this model and these settings, since the server started."""
    last_failure: Failed | None
    """The last failure. It stays after another process has worked."""
    failed: float
    """The time of ``last_failure``."""
    pause: float
    """Seconds until this runner may be started again with this model; 0 if it runs or may be started now."""
    tokens_per_second: float
    cpu: CpuUse | None
    prefixes: PrefixUse | None
    notes: tuple[str, ...]
    """See ``RunnerProcess.notes``."""
    reserved: Memory
    """Empty until it may load."""
    measured: Memory | None
    """None until it has loaded."""
    plan: PlacementPlan | None
    pinned: bool
    time_left: float | None
    """Seconds until it is unloaded if nobody uses it from now on; None for never."""


Kind = tuple[str, str, str]
"""Model id, place (see ``router.place``), and the digest of its settings. Each kind has a circuit breaker."""


@dataclass(slots=True, eq=False)
class RunnerInstance:
    """A runner process. The pool sets ``process`` right after it has made the instance."""

    id: str
    runner: str
    card: ModelCard
    """The card that started it. It may have changed or gone since."""
    settings: str
    backend: str
    started: float
    """In seconds since 1970."""
    host: str = ""
    """The remote host; empty for this machine."""
    peers: tuple[str, ...] = ()
    """The hosts that have parts of the model, besides the runner's own."""
    process: "RunnerProcess" = field(init=False)
    decision: asyncio.Future[LoadOption | RunnerError] = field(default_factory=asyncio.Future[LoadOption | RunnerError])
    """The memory budget's decision: what it may load, or why it may not."""
    plan: PlacementPlan | None = None
    """How it is loaded; None before the decision, and where memory is not counted."""
    _smaller: tuple[LoadOption, PlacementPlan] | None = None
    """How it is loaded if memory runs out otherwise."""

    @property
    def model_id(self) -> str:
        """The card's model id."""
        return self.card.model_id

    @property
    def usable(self) -> bool:
        """Whether its process loads or serves."""
        return self.process.status.state not in ENDINGS

    @property
    def kind(self) -> Kind:
        """See ``Kind``."""
        return self.model_id, place(self.runner, self.host), self.settings

    @property
    def labels(self) -> tuple[str, str, str]:
        """Model id, place and backend, by which a server counts."""
        return self.model_id, place(self.runner, self.host), self.backend

    def grant(
        self, estimated: Estimated, option: LoadOption, budget: "MemoryBudget"
    ) -> tuple[LoadOption, LoadOption | None]:
        """Notes how it is loaded, and returns the option and the next smaller one that fits if memory runs out."""
        reservation, room = budget.reservation(self.id), None
        if budget.capacity is not None:
            room = budget.free + budget.need(option)
        if reservation is not None and (refusal := reservation.too_large) is not None:
            option = estimated.choices[-1]  # as estimated, and not as reserved
            note = refusal.forced_note(self.model_id)
            log.warning("%s: %s", self.id, note)
            self.process.warnings += (note,)
        self.plan = plan = PlacementPlan.of(estimated, option, budget, room)
        if plan.context_length:
            log.info("%s: slots: %s (%s)", self.id, plan.cache, plan.limit)
        fits = (each for each in estimated.smaller(option) if room is None or budget.need(each).fits(room))
        if (smaller := next(fits, None)) is not None:
            self._smaller = smaller, PlacementPlan.of(estimated, smaller, budget, room)
        return option, smaller

    def shrink(self, budget: "MemoryBudget") -> None:
        """It has loaded the smaller option, because memory had run out with the granted one."""
        assert self._smaller is not None
        option, plan = self._smaller
        budget.reduce(self.id, option)
        self.plan = plan.model_copy(update={"limit": "memory ran out at the first attempt"})
        log.warning("%s: %s", self.id, "; ".join(self.process.notes))

    def describe(self) -> LiveRunner:
        """The router's view of it."""
        process = self.process
        slots = process.capabilities.slots if process.capabilities else 0
        active = min(process.pending, slots)
        return LiveRunner(
            runner=self.runner,
            instance=self.id,
            model_id=self.model_id,
            state=process.status.state,
            slots=slots,
            active=active,
            waiting=process.pending - active,
            capabilities=process.capabilities,
            host=self.host,
        )

    def uses(self, host: str, reservation: Reservation | None) -> bool:
        """Whether it is on a remote host, or has a part of its model or memory there."""
        accounts = () if reservation is None else reservation.reserved.devices
        return host in (self.host, *self.peers) or any(host_of(each) == host for each in accounts)

    def report(
        self, now: float, breaker: CircuitBreaker, reservation: Reservation | None, pid: int | None
    ) -> InstanceReport:
        """``now`` is on the clock of ``breaker`` and ``reservation``."""
        return InstanceReport(
            now=self.describe(),
            card=self.card,
            status=self.process.status,
            backend=self.backend,
            settings=self.settings,
            pid=pid,
            started=self.started,
            deaths=breaker.deaths,
            last_failure=breaker.last,
            failed=time.time() - (now - breaker.last_at),
            pause=breaker.pause(now),
            tokens_per_second=self.process.rate.per_second(now),
            cpu=self.process.cpu,
            prefixes=self.process.prefixes,
            notes=self.process.notes,
            reserved=Memory() if reservation is None else reservation.reserved,
            measured=None if reservation is None else reservation.measured,
            plan=self.plan,
            pinned=reservation is not None and reservation.pinned,
            time_left=None if reservation is None else reservation.time_left(now),
        )
