"""Measures how long steps take, and derives how many prompt tokens a step may compute without stalling streams."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

_KEPT = 0.7
"""The weight of earlier measurements when a new one is added."""
_TRUSTED = 0.998
"""Each new measurement multiplies the times of larger steps by this. A larger step that was slow once is not made any
more, so it would never be measured again."""
_TELLING = 64
"""Prompt tokens of a step that counts as a full measurement. A step with fewer has less weight."""


@dataclass(slots=True)
class Pace:
    """``bound`` is the longest time, in seconds, from the end of one decode step to the end of the next.

    If a decode step alone takes more than half of the bound, prompts get as much time as the decode step.
    """

    bound: float
    _decoding: dict[int, float] = field(default_factory=dict[int, float])  # seconds of a decode step, by its rows
    _prompt_seconds: float = 0.0  # of recent prefill steps, with decaying weights, as are their tokens
    _prompt_tokens: float = 0.0

    def decoded(self, n_rows: int, seconds: float) -> None:
        """Notes a decode step."""
        before = self._decoding.get(n_rows, seconds)
        self._decoding = {n: _TRUSTED * old if n > n_rows else old for n, old in self._decoding.items()}
        self._decoding[n_rows] = _KEPT * before + (1 - _KEPT) * seconds

    def prefilled(self, n_tokens: int, seconds: float) -> None:
        """Notes a prefill step."""
        kept = _KEPT ** min(1.0, n_tokens / _TELLING)
        self._prompt_seconds = kept * self._prompt_seconds + seconds
        self._prompt_tokens = kept * self._prompt_tokens + n_tokens

    def decoding(self, n_rows: int) -> float:
        """Returns the seconds of a decode step with ``n_rows``, interpolated; 0 before any measurement."""
        if n_rows == 0 or not self._decoding:
            return 0.0
        known = sorted(self._decoding)
        above = bisect_left(known, n_rows)
        high, low = known[min(above, len(known) - 1)], known[max(above - 1, 0)]
        if high <= n_rows or low >= n_rows:
            return self._decoding[high]
        share = (n_rows - low) / (high - low)
        return self._decoding[low] + share * (self._decoding[high] - self._decoding[low])

    def prompt_seconds(self, n_tokens: int) -> float:
        """Returns how long so many prompt tokens take; 0 before any measurement."""
        return n_tokens * self._prompt_seconds / self._prompt_tokens if self._prompt_tokens else 0.0

    def tokens_in(self, seconds: float, least: int, most: int) -> int:
        """Returns how many prompt tokens take ``seconds``, from ``least`` to ``most``; ``most`` if unmeasured."""
        if not self._prompt_seconds:
            return most
        return min(max(int(seconds * self._prompt_tokens / self._prompt_seconds), least), most)

    def prompt_tokens(self, n_decoding: Sequence[int], least: int, most: int) -> int:
        """Returns how many prompt tokens may follow decode steps, from ``least`` to ``most``.

        ``n_decoding`` are the rows of each decode step. Before any measurement of prompts it is ``least``.
        """
        if not n_decoding:
            return most
        decoding = sum(map(self.decoding, n_decoding))
        seconds = max(self.bound - decoding, decoding)
        return self.tokens_in(seconds, least, most) if self._prompt_seconds else min(least, most)
