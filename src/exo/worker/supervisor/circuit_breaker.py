"""How a runner fares with a model, over all its processes: when it may start again, and when it is to be avoided."""

from dataclasses import dataclass

from exo.worker.protocol.messages import Failed

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
FAILURES_TO_AVOID = 3
AVOIDED_SECONDS = 60.0
"""How long another engine is preferred to one that keeps failing, before that is tried again."""


@dataclass(slots=True)
class CircuitBreaker:
    """Failures in a row, that is without a token in between. Times are on the clock of the caller, in seconds.

    A first failure may be an accident, so the next process starts at once. After the second there is a pause, which
    doubles with each further one. A token that is computed forgives it all.
    """

    failures: int = 0
    deaths: int = 0
    """Failures in all, which no token makes undone."""
    last: Failed | None = None
    """Why it failed last, kept after it has worked again."""
    last_at: float = 0.0
    """When that was."""
    _paused_until: float = 0.0
    _avoided_until: float = 0.0

    def failed(self, failed: Failed, now: float, jitter: float, *, lasting: bool = False) -> None:
        """Counts a process that ended. ``jitter``, 0 to 1, takes up to half of the pause off, so that models differ.

        ``lasting`` if the next one will most likely fail alike, as it does where a file is torn or memory too small.
        """
        self.failures += 1
        self.deaths += 1
        self.last, self.last_at = failed, now
        if self.failures > 1:
            doublings = min(self.failures - 2, 30)
            self._paused_until = now + min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**doublings) * (1 - jitter / 2)
        if lasting or self.failures >= FAILURES_TO_AVOID:
            self._avoided_until = now + AVOIDED_SECONDS

    def worked(self) -> None:
        """Forgives all failures."""
        self.failures = 0
        self._paused_until = self._avoided_until = 0.0

    def pause(self, now: float) -> float:
        """Seconds until the next process may start; 0 if it may now."""
        return max(0.0, self._paused_until - now)

    def avoided(self, now: float) -> bool:
        """Whether another engine should serve the model, if there is one."""
        return now < self._avoided_until
