"""How long steps take on this machine, and what of a prompt one step may compute without stalling the streams."""

from bisect import bisect_left
from dataclasses import dataclass, field

_KEPT = 0.7
"""Of what was measured before, at a new measurement: a single hiccup counts for little and is soon forgotten."""
_TRUSTED = 0.998
"""What is left, at each new measurement, of the time of steps with more rows: once they looked slow they are not made
any more, and one hiccup would rule them out for ever."""
_TELLING = 64
"""Prompt tokens from which on a step tells what one of them takes; fewer replace less of what was measured before."""


@dataclass(slots=True)
class Pace:
    """Measured steps, and the ``bound`` in seconds from one step of the streams to the end of the next.

    Where the streams' step alone takes more than half the bound, prompts get as much time as it does.
    """

    bound: float
    _decoding: dict[int, float] = field(default_factory=dict[int, float])
    """Seconds of a step of so many rows of decoding sequences."""
    _prompt_seconds: float = 0.0
    _prompt_tokens: float = 0.0
    """What prompts took of late, and how many tokens of them there were."""

    def decoded(self, n_rows: int, seconds: float) -> None:
        """Notes a step of decoding sequences."""
        before = self._decoding.get(n_rows, seconds)
        self._decoding = {n: _TRUSTED * old if n > n_rows else old for n, old in self._decoding.items()}
        self._decoding[n_rows] = _KEPT * before + (1 - _KEPT) * seconds

    def prefilled(self, n_tokens: int, seconds: float) -> None:
        """Notes a step of prompts."""
        kept = _KEPT ** min(1.0, n_tokens / _TELLING)
        self._prompt_seconds = kept * self._prompt_seconds + seconds
        self._prompt_tokens = kept * self._prompt_tokens + n_tokens

    def decoding(self, n_rows: int) -> float:
        """Seconds of a step with so many rows, between those that were measured; 0 for none, or if none was."""
        if n_rows == 0 or not self._decoding:
            return 0.0
        known = sorted(self._decoding)
        above = bisect_left(known, n_rows)
        high, low = known[min(above, len(known) - 1)], known[max(above - 1, 0)]
        if high <= n_rows or low >= n_rows:
            return self._decoding[high]
        share = (n_rows - low) / (high - low)
        return self._decoding[low] + share * (self._decoding[high] - self._decoding[low])

    def tokens_in(self, seconds: float, least: int, most: int) -> int:
        """Prompt tokens that take about so long, from ``least`` to ``most``; ``most`` before anything is known."""
        if not self._prompt_seconds:
            return most
        return min(max(int(seconds * self._prompt_tokens / self._prompt_seconds), least), most)

    def prompt_tokens(self, n_decoding: int, least: int, most: int) -> int:
        """Prompt tokens to compute after a step of so many decoding rows: from ``least`` to ``most``.

        ``least`` is also what is tried before anything is known.
        """
        if n_decoding == 0:
            return most
        decoding = self.decoding(n_decoding)
        seconds = max(self.bound - decoding, decoding)
        return self.tokens_in(seconds, least, most) if self._prompt_seconds else min(least, most)
