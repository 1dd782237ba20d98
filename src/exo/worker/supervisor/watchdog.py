"""Decides when a runner counts as hung: after a time without messages, or during a load without progress."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, final

import anyio

from exo.worker.protocol.events import Capabilities, Estimated, Event, Heartbeat, Status

_CHECKS = 5
"""Checks per deadline. A server that was itself stopped for a while, as by Ctrl-Z, misses only one of them, so it does
not take its own pause for the runner's."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds after which a runner counts as dead."""

    handshake: float = 60  # until its first message
    loading: float = 60  # without a message while it loads: an importing library may hold the GIL for long
    serving: float = 10  # without a message once the model is loaded
    step: float = 300  # without a step while it has requests, in a slot or waiting
    stalled: float = 300  # estimating or loading with nothing reported, nothing read and almost nothing computed
    unreported: float = 3600  # the same while it computes: compiling takes long, but a busy-wait computes as well
    grace: float = 5  # for each way to end it, from Shutdown to SIGKILL

    @classmethod
    def of_load(cls, seconds: float) -> Self:
        """The default deadlines, with ``seconds`` for a load without progress."""
        return cls(stalled=seconds, unreported=seconds * cls().unreported / cls().stalled)


DEADLINES = Deadlines()

_IDLE_SHARE = 0.01
"""Share of one CPU below which a process is waiting, not computing."""
_IDLE_BYTES = 1 << 20
"""Fewer bytes read are not the loading of a model."""
_LONGEST_GAP = 5.0
"""Seconds between two heartbeats. A longer gap means that the server itself was stopped."""


@final
class LoadProgress:
    """Watches one estimate or load. Times are the caller's, in seconds.

    A heartbeat alone proves nothing here: another thread sends it while the load hangs. Progress is a new status, bytes
    read, or CPU time. CPU time alone counts only for a limited time, because a busy-wait consumes it too.
    """

    def __init__(self, deadlines: Deadlines, now: float, phase: str = "") -> None:
        """``phase`` names the time before the first change of status."""
        self._deadlines = deadlines
        self._now = now
        self._phase = phase
        self._idle = self._unreported = 0.0  # seconds without any progress, and without any but CPU time
        self._cpu = self._cpu_before = 0.0
        self._read = 0
        self.done = False

    def take(self, event: Event, before: Status, now: float) -> str | None:
        """Notes an event that follows the status ``before``. Returns the fault if there is no progress for too long."""
        match event:
            case Estimated() | Status(capabilities=Capabilities()):
                self.done = True
            case Status(state=state, layers_loaded=layers):
                if (state, layers) != (before.state, before.layers_loaded):
                    self._progressed()
            case Heartbeat() if not self.done and (fault := self.beat(event, now)) is not None:
                layers = f" ({before.layers_loaded} of {before.total_layers})" if before.total_layers else ""
                return f"it {fault} {self._phase if before.state == 'Idle' else f'in the state {before.state}{layers}'}"
            case _:
                pass
        return None

    def _progressed(self) -> None:
        self._idle = self._unreported = 0.0
        self._cpu_before = self._cpu

    def beat(self, beat: Heartbeat, now: float) -> str | None:
        """Notes a heartbeat. Returns the fault, as a predicate, if there is no progress for too long."""
        gap = min(now - self._now, _LONGEST_GAP)
        self._now = now
        self._idle += gap
        self._unreported += gap
        self._cpu = beat.cpu_seconds
        # A negative difference: a child has ended, and its share of the count is gone.
        if not 0 <= self._cpu - self._cpu_before < _IDLE_SHARE * self._deadlines.stalled:
            self._idle, self._cpu_before = 0.0, self._cpu
        if not 0 <= beat.bytes_read - self._read < _IDLE_BYTES:
            self._read = beat.bytes_read
            self._progressed()
        if self._idle > self._deadlines.stalled:
            return f"reported, read and computed nothing for {self._deadlines.stalled:g} seconds"
        if self._unreported > self._deadlines.unreported:
            return f"computed for {self._deadlines.unreported:g} seconds without reporting progress or reading anything"
        return None


@final
class HeartbeatWatchdog:
    """Every message of a runner resets it; a runner sends a heartbeat about once a second."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._reset = False

    def reset(self) -> None:
        """Notes a message."""
        self._reset = True

    async def expired(self, is_loading: Callable[[], bool]) -> str:
        """Returns the fault once the runner has been silent for too long: stopped, or hung."""
        period = min(self._deadlines.loading, self._deadlines.serving) / _CHECKS
        silence, allowed = 0.0, self._deadlines.loading
        while silence < allowed:
            self._reset = False
            await anyio.sleep(period)
            silence = 0.0 if self._reset else silence + period
            allowed = self._deadlines.loading if is_loading() else self._deadlines.serving
        return f"it sent nothing for {allowed:g} seconds, not even its heartbeat"
