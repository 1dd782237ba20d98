"""How long a runner may say nothing, or load without progress, before it is taken for dead."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, final

import anyio

from exo.worker.protocol.messages import Heartbeat

_LOOKS = 5
"""How often a silence is looked at before its deadline. A server that is itself stopped for a while, as by Ctrl-Z, then
misses one look and not the whole deadline."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds after which a runner is taken for dead."""

    handshake: float = 60
    """Until its first word."""
    loading: float = 60
    """Without a word while it loads: libraries that start up may hold the interpreter, and the heartbeat, for long."""
    serving: float = 10
    """Without a word once the model is loaded."""
    step: float = 300
    """Without a step while it has requests, in a slot or waiting."""
    stalled: float = 300
    """Without progress while it estimates or loads: nothing reported, nothing read, and next to nothing computed."""
    unreported: float = 3600
    """The same, but for computing: what compiles may take long, and what waits in a loop computes as well."""
    grace: float = 5
    """For each of the ways to end it, from the polite to the last."""

    @classmethod
    def of_load(cls, seconds: float) -> Self:
        """With so many seconds for a load that makes no progress, and the usual ones for all else."""
        return cls(stalled=seconds, unreported=seconds * cls().unreported / cls().stalled)


DEADLINES = Deadlines()

_IDLE_SHARE = 0.01
"""Of a processor's time: what computes less is waiting."""
_IDLE_BYTES = 1 << 20
"""What reads less is not loading."""
_LONGEST_GAP = 5.0
"""Between two heartbeats; more is time for which the server itself was stopped, as by Ctrl-Z."""


@final
class LoadProgress:
    """Whether an estimate or a load gets on, as reports and heartbeats show it. Times are the caller's, in seconds."""

    def __init__(self, deadlines: Deadlines, now: float) -> None:
        self._deadlines = deadlines
        self._now = now
        self._idle = self._unreported = 0.0
        """Seconds since anything was done, and since anything was done but computing."""
        self._cpu = self._cpu_before = 0.0
        self._read = 0

    def report(self) -> None:
        """Notes that the runner has reported progress."""
        self._idle = self._unreported = 0.0
        self._cpu_before = self._cpu

    def beat(self, beat: Heartbeat, now: float) -> str | None:
        """Notes a heartbeat. Returns what is wrong, going on from "it", once there was no progress for too long."""
        gap = min(now - self._now, _LONGEST_GAP)
        self._now = now
        self._idle += gap
        self._unreported += gap
        self._cpu = beat.cpu_seconds
        # Less than before: a child has ended, and with it the count of what it did.
        if not 0 <= self._cpu - self._cpu_before < _IDLE_SHARE * self._deadlines.stalled:
            self._idle, self._cpu_before = 0.0, self._cpu
        if not 0 <= beat.bytes_read - self._read < _IDLE_BYTES:
            self._read = beat.bytes_read
            self.report()
        if self._idle > self._deadlines.stalled:
            return f"reported, read and computed nothing for {self._deadlines.stalled:g} seconds"
        if self._unreported > self._deadlines.unreported:
            return f"computed for {self._deadlines.unreported:g} seconds without reporting progress or reading anything"
        return None


@final
class HeartbeatWatchdog:
    """A runner's, which its every word breaks, its heartbeat included."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._heard = False

    def end(self) -> None:
        """Notes a word."""
        self._heard = True

    async def too_long(self, is_loading: Callable[[], bool]) -> str:
        """Returns once it has lasted too long: the runner is stopped, or it hangs. Says so, going on from "it"."""
        look = min(self._deadlines.loading, self._deadlines.serving) / _LOOKS
        silence, allowed = 0.0, self._deadlines.loading
        while silence < allowed:
            self._heard = False
            await anyio.sleep(look)
            silence = 0.0 if self._heard else silence + look
            allowed = self._deadlines.loading if is_loading() else self._deadlines.serving
        return f"said nothing for {allowed:g} seconds, not even its heartbeat"
