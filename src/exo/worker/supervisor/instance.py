"""One runner process of the server's, with what it was started for and what is to be told of it."""

import hashlib
import json
import time
from dataclasses import dataclass, field

import anyio

from exo.cards.card import ModelCard
from exo.worker.protocol.messages import CpuUse, Failed, LoadOption, Status
from exo.worker.router import LiveRunner
from exo.worker.supervisor.circuit_breaker import CircuitBreaker
from exo.worker.supervisor.memory import Memory
from exo.worker.supervisor.memory_budget import Reservation
from exo.worker.supervisor.runner_process import RunnerError, RunnerProcess
from exo.worker.supervisor.state_machine import ENDINGS


def settings_digest(card: ModelCard, runner: str) -> str:
    """Tells apart what a runner is told to load by different versions of a model card."""
    settings = json.dumps([card.engines.get(runner, {}), card.tasks], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One instance for whoever looks after the server. Times are in seconds since 1970."""

    now: LiveRunner
    card: ModelCard
    """By which it was started."""
    status: Status
    backend: str
    settings: str
    """The digest of what it was told to load."""
    pid: int | None
    """None where there is no process any more, or not yet."""
    started: float
    deaths: int
    """Processes of this runner that failed with this model and these settings since the server started."""
    last_failure: Failed | None
    """Of the last of them; what it says stays here after another has worked."""
    failed: float
    """When that was."""
    pause: float
    """Seconds until this runner may be started again with this model; 0 if it runs or may be started now."""
    tokens_per_second: float
    cpu: CpuUse | None
    """How it uses the CPU; None where it does not, or does not tell."""
    reserved: Memory
    """On the account of memory; nothing until it may load."""
    measured: Memory | None
    """What it has, by the last look; None until it has loaded."""
    pinned: bool
    time_left: float | None
    """Seconds until it is unloaded if nobody uses it from now on; None if it is not."""


Kind = tuple[str, str, str]
"""Model id, runner, and the digest of its settings."""


@dataclass(slots=True, eq=False)
class Instance:
    """A runner process. ``process`` is set by whoever starts it, before anything else is done with this."""

    id: str
    runner: str
    card: ModelCard
    """By which it was started; there may be a newer one, or none, since then."""
    settings: str
    """The digest of what it is told to load, by that card."""
    backend: str
    started: float
    """In seconds since 1970."""
    process: RunnerProcess = field(init=False)
    decision: LoadOption | RunnerError | None = None
    """Whether it may load, once that is known."""
    decided: anyio.Event = field(default_factory=anyio.Event)

    def decide(self, decision: LoadOption | RunnerError) -> None:
        """Lets it load, or not. Once."""
        self.decision = decision
        self.decided.set()

    async def admission(self) -> LoadOption:
        """Waits until it may load. Raises ``RunnerError`` if it may not."""
        await self.decided.wait()
        match self.decision:
            case LoadOption() as choice:
                return choice
            case RunnerError() as error:
                raise error
            case None:
                raise AssertionError("decided without a decision")

    @property
    def model_id(self) -> str:
        """The card's."""
        return self.card.model_id

    @property
    def usable(self) -> bool:
        """Whether its process loads or serves."""
        return self.process.status.state not in ENDINGS

    @property
    def kind(self) -> Kind:
        """What its health is kept by."""
        return self.model_id, self.runner, self.settings

    def describe(self) -> LiveRunner:
        """For the router."""
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
        )

    def report(self, now: float, health: CircuitBreaker, entry: Reservation | None) -> InstanceReport:
        """``now`` is on the clock of ``health`` and ``entry``, which is its own on the account of memory."""
        return InstanceReport(
            now=self.describe(),
            card=self.card,
            status=self.process.status,
            backend=self.backend,
            settings=self.settings,
            pid=self.process.pid,
            started=self.started,
            deaths=health.deaths,
            last_failure=health.last,
            failed=time.time() - (now - health.last_at),
            pause=health.pause(now),
            tokens_per_second=self.process.rate.per_second(now),
            cpu=self.process.cpu,
            reserved=Memory() if entry is None else entry.reserved,
            measured=None if entry is None else entry.measured,
            pinned=entry is not None and entry.pinned,
            time_left=None if entry is None else entry.time_left(now),
        )
