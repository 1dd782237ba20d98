"""How fast a runner generates, from what it delivers. Pure."""

from collections import deque
from typing import final

WINDOW_SECONDS = 5.0


@final
class TokenRate:
    """Tokens a second over the last seconds. Times are on the caller's clock, in seconds."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()
        """One entry for each tenth of a second in which tokens came, with its beginning."""
        self._total = 0

    def add(self, tokens: int, now: float) -> None:
        """Counts tokens that have come."""
        if not self._counts or now - self._counts[-1][0] > 0.1:
            self._forget(now)
            self._counts.append((now, 0))
        at, count = self._counts.pop()
        self._counts.append((at, count + tokens))
        self._total += tokens

    def per_second(self, now: float) -> float:
        """Over the window, or since the first token in it if that is less; 0 where none came."""
        self._forget(now)
        if not self._counts:
            return 0.0
        return self._total / max(1.0, now - self._counts[0][0])

    def _forget(self, now: float) -> None:
        while self._counts and now - self._counts[0][0] > WINDOW_SECONDS:
            self._total -= self._counts.popleft()[1]
