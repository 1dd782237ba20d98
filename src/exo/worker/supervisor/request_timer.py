"""Measures a runner's speed by the requests that it has. Pure; times are on the caller's clock, in seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from exo.worker.protocol.messages import Delta, Embedded, Event, Failed, Finished, Ranked, Tokenized
from exo.worker.speed import Measurement

_TELLING = 8
"""Tokens after the first from which on a request tells something about speed."""
_DISTURBING = 0.25
"""Requests of other runners, for each of this one's, from which on a measurement tells of them as well."""


@final
class RequestCount:
    """Requests in flight, now and added up over time."""

    def __init__(self) -> None:
        self._now = 0
        self._sum = 0.0
        self._at = 0.0

    def change(self, by: int, now: float) -> None:
        """So many more, or less."""
        self._sum, self._at = self.over_time(now), now
        self._now += by

    def over_time(self, now: float) -> float:
        """Requests times seconds until now."""
        return self._sum + self._now * (now - self._at)


@dataclass(slots=True)
class _Start:
    """What the counts were when a request began, and when its first tokens came."""

    at: float
    mine: float
    everyones: float
    tokens: int
    measured: bool
    first: float | None = None
    first_tokens: int = 0


@final
class RequestTimer:
    """The requests of one runner process. ``everyones`` counts those of every runner on the host.

    ``on_measured`` gets what each request that came to its end tells. Nothing is told by a process's first request,
    which may find things cold, by requests of a few tokens, by those that another runner began, and where other
    runners were too busy meanwhile.
    """

    def __init__(self, everyones: RequestCount, on_measured: Callable[[Measurement], None]) -> None:
        self._everyones = everyones
        self._mine = RequestCount()
        self._on_measured = on_measured
        self._tokens = 0
        self._open: dict[str, _Start] = {}
        self._silent: set[str] = set()
        """Those of ``_open`` that wait for their first token."""
        self._warm = False

    def begin(self, request: str, now: float, *, measured: bool) -> None:
        """A request is sent to the runner; ``measured`` if it may tell how fast that is."""
        mine, everyones = self._mine.over_time(now), self._everyones.over_time(now)
        self._open[request] = _Start(now, mine, everyones, self._tokens, measured)
        if measured:
            self._silent.add(request)
        self._change(1, now)

    def deltas(self, items: Sequence[Delta], tokens: int, now: float) -> None:
        """One step's output: ``tokens`` in all."""
        self._tokens += tokens
        if self._silent:
            for delta in items:
                if delta.tokens and delta.id in self._silent:
                    self._silent.discard(delta.id)
                    start = self._open[delta.id]
                    start.first, start.first_tokens = now, len(delta.tokens)

    def take(self, event: Event, now: float) -> None:
        """Whatever else the runner says; what matters of it is that a request has ended."""
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
        """The process is gone, and all its requests are."""
        for request in tuple(self._open):
            self._end(request, now)

    def _end(self, request: str, now: float) -> None:
        if self._open.pop(request, None) is not None:
            self._silent.discard(request)
            self._change(-1, now)

    def _change(self, by: int, now: float) -> None:
        self._mine.change(by, now)
        self._everyones.change(by, now)

    def _measure(self, start: _Start, tokens: int, now: float) -> None:
        warm, self._warm = self._warm, True
        if not (warm and start.measured) or start.first is None:
            return
        after_first = tokens - start.first_tokens
        if after_first < _TELLING or not start.at < start.first < now:
            return
        seconds = now - start.at
        load = (self._mine.over_time(now) - start.mine) / seconds
        others = (self._everyones.over_time(now) - start.everyones) / seconds - load
        if others <= _DISTURBING * load:
            self._on_measured(
                Measurement(
                    load=max(1.0, load),
                    first=start.first - start.at,
                    stream=after_first / (now - start.first),
                    total=(self._tokens - start.tokens) / seconds,
                )
            )
