"""Measures a runner's speed by its requests. Pure; times are on the caller's clock, in seconds."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from exo.worker.protocol.events import Delta, Embedded, Event, Failed, Finished, Ranked, Tokenized
from exo.worker.speed import Measurement

WINDOW_SECONDS = 5.0
_LEAST_TOKENS = 8
"""Tokens after the first that a request needs to count as a measurement."""
_DISTURBING = 0.25
"""A measurement is dropped if other runners, which share the hardware, had more requests than this share of its own."""


@final
class TokenRate:
    """Tokens a second over the last five seconds."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, int]] = deque()  # one entry for each tenth of a second with tokens
        self._total = 0

    def add(self, tokens: int, now: float) -> None:
        """Counts tokens."""
        if not self._counts or now - self._counts[-1][0] > 0.1:
            self._forget(now)
            self._counts.append((now, 0))
        at, count = self._counts.pop()
        self._counts.append((at, count + tokens))
        self._total += tokens

    def per_second(self, now: float) -> float:
        """The rate over the window, or since its first token if that is less, but at least over a second."""
        self._forget(now)
        if not self._counts:
            return 0.0
        return self._total / max(1.0, now - self._counts[0][0])

    def _forget(self, now: float) -> None:
        while self._counts and now - self._counts[0][0] > WINDOW_SECONDS:
            self._total -= self._counts.popleft()[1]


@final
class RequestCount:
    """Requests in flight, and their integral over time."""

    def __init__(self) -> None:
        self._now = 0
        self._sum = 0.0
        self._at = 0.0

    def change(self, by: int, now: float) -> None:
        """Adds ``by`` requests, which may be negative."""
        self._sum, self._at = self.over_time(now), now
        self._now += by

    def over_time(self, now: float) -> float:
        """Requests times seconds until now."""
        return self._sum + self._now * (now - self._at)


@dataclass(slots=True)
class _Start:
    """The counts when a request began, and the arrival of its first tokens."""

    at: float
    mine: float
    everyones: float
    tokens: int
    measured: bool
    first: float | None = None
    first_tokens: int = 0


@final
class RequestTimer:
    """Times the requests of one runner process. ``everyones`` counts the requests of all runners on the host.

    ``on_measured`` gets a measurement of each finished request, with four exceptions: a process's first request, which
    finds caches cold, short requests, requests that another runner began, and those beside busy other runners.
    """

    def __init__(self, everyones: RequestCount, on_measured: Callable[[Measurement], None]) -> None:
        self._everyones = everyones
        self._mine = RequestCount()
        self._on_measured = on_measured
        self._tokens = 0
        self._open: dict[str, _Start] = {}
        self._awaiting_first: set[str] = set()  # those of ``_open`` without a token: most steps need not look further
        self._warm = False

    def begin(self, request: str, now: float, *, measured: bool) -> None:
        """A request is sent to the runner. ``measured``: it may become a measurement."""
        mine, everyones = self._mine.over_time(now), self._everyones.over_time(now)
        self._open[request] = _Start(now, mine, everyones, self._tokens, measured)
        if measured:
            self._awaiting_first.add(request)
        self._change(1, now)

    def deltas(self, items: Sequence[Delta], tokens: int, now: float) -> None:
        """Takes one step's output, of ``tokens`` in all."""
        self._tokens += tokens
        if self._awaiting_first:
            for delta in items:
                if delta.tokens and delta.id in self._awaiting_first:
                    self._awaiting_first.discard(delta.id)
                    start = self._open[delta.id]
                    start.first, start.first_tokens = now, len(delta.tokens)

    def take(self, event: Event, now: float) -> None:
        """Takes any other event; terminal ones count."""
        match event:
            case Finished(id=request, reason="stop" | "length", usage=usage):
                if (start := self._open.get(request)) is not None:
                    self._measure(start, usage.completion_tokens, now)
                self._end(request, now)
            case Finished(id=request) | Embedded(id=request) | Ranked(id=request) | Tokenized(id=request):
                self._end(request, now)
            case Failed(id=str(request)):
                self._end(request, now)
            case _:
                pass

    def close(self, now: float) -> None:
        """Ends all requests: the process is gone."""
        for request in tuple(self._open):
            self._end(request, now)

    def _end(self, request: str, now: float) -> None:
        if self._open.pop(request, None) is not None:
            self._awaiting_first.discard(request)
            self._change(-1, now)

    def _change(self, by: int, now: float) -> None:
        self._mine.change(by, now)
        self._everyones.change(by, now)

    def _measure(self, start: _Start, tokens: int, now: float) -> None:
        warm, self._warm = self._warm, True
        if not (warm and start.measured) or start.first is None:
            return
        after_first = tokens - start.first_tokens
        if after_first < _LEAST_TOKENS or not start.at < start.first < now:
            return
        seconds = now - start.at
        load = (self._mine.over_time(now) - start.mine) / seconds
        others = (self._everyones.over_time(now) - start.everyones) / seconds - load
        if others <= _DISTURBING * load:
            first, total = start.first - start.at, (self._tokens - start.tokens) / seconds
            self._on_measured(Measurement(max(1.0, load), first, after_first / (now - start.first), total))
