"""Counts a runner's failures with a model, and derives when it may start again and when another is preferred."""

import math
from dataclasses import dataclass

from exo.worker.protocol.events import Failed
from exo.worker.supervisor.runner_error import RunnerError

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
FAILURES_TO_AVOID = 3
AVOIDED_SECONDS = 60.0
"""The time for which another runner is preferred before this one is tried again."""


@dataclass(slots=True)
class CircuitBreaker:
    """Counts consecutive failures without a token in between. Times are on the caller's clock, in seconds.

    A first failure may be an accident, so the next process starts at once. After the second there is a pause, which
    doubles with each further failure. A computed token resets the count.
    """

    failures: int = 0
    deaths: int = 0  # never reset
    last: Failed | None = None  # the last failure, kept after the runner has worked again
    last_at: float = 0.0
    _paused_until: float = 0.0
    _avoided_until: float = 0.0

    def failed(self, failed: Failed, now: float, jitter: float, *, lasting: bool = False) -> None:
        """Counts a failed process. ``jitter``, 0 to 1, shortens the pause by up to a half, so that models spread out.

        ``lasting``: the next process would most likely fail in the same way, as with a damaged file.
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
        """Resets it."""
        self.failures = 0
        self._paused_until = self._avoided_until = 0.0

    def pause(self, now: float) -> float:
        """Seconds until the next process may start; 0 if it may now."""
        return max(0.0, self._paused_until - now)

    def check_pause(self, model_id: str, runner: str, now: float) -> None:
        """Raises ``RunnerError`` with the last failure if the next process may not start yet."""
        if (seconds := self.pause(now)) and self.last is not None:
            message = (
                f"runner {runner} failed {self.failures} times in a row with {model_id} and is started again in "
                f"{math.ceil(seconds)} s; the last failure: {self.last.message}"
            )
            raise RunnerError(Failed(code=self.last.code, message=message), seconds)

    def avoided(self, now: float) -> bool:
        """Whether another runner should serve the model, if there is one."""
        return now < self._avoided_until
