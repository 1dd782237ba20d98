"""Totals of all requests of a server by model, runner and backend: tokens, seconds, and how they ended."""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

Labels = tuple[str, str, str]
"""Model id, runner and backend. Model ids are those of model cards, so their number is bounded."""

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)
_MOST_CODES = 100


@final
class Histogram:
    """Counts values by size. Bucket i has those of at most ``bounds[i]`` that no smaller bucket has."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one has the values above every bound
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Adds a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: list[float]) -> None:
        """Adds values, with little work for each."""
        values.sort()
        below = 0
        for at, bound in enumerate(self.bounds):
            count = bisect_right(values, bound)
            self.counts[at] += count - below
            below = count
        self.counts[-1] += len(values) - below
        self.sum += sum(values)


_seconds = partial(Histogram, SECONDS)


@dataclass(slots=True)
class RequestTotals:
    """Counts that only grow. Histograms are of seconds."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    queried_tokens: int = 0
    """Prompt tokens of the requests whose ``cached_tokens`` are known."""
    cached_tokens: int = 0
    replays: int = 0
    replayed_tokens: int = 0
    failovers: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter[str])
    routes: Counter[str] = field(default_factory=Counter[str])
    first_token: Histogram = field(default_factory=_seconds)
    inter_token: Histogram = field(default_factory=partial(Histogram, TOKEN_SECONDS))
    whole: Histogram = field(default_factory=_seconds)
    queue: Histogram = field(default_factory=_seconds)
    prefill: Histogram = field(default_factory=_seconds)
    decode: Histogram = field(default_factory=_seconds)


@final
class Totals:
    """The totals of a server."""

    def __init__(self) -> None:
        self.requests: defaultdict[Labels, RequestTotals] = defaultdict(RequestTotals)
        self.refused: Counter[str] = Counter()
        """Requests that ended with an error, by its code."""

    def note_refusal(self, code: str) -> None:
        """A request has ended with an error."""
        known = code in self.refused or len(self.refused) < _MOST_CODES
        self.refused[code if known else "other"] += 1
