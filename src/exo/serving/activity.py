"""The record of each request, its facts and progress, and the last records of a server."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, final

from exo.serving.admission import Place
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted, Completed, GenerationEvent, Prefill
from exo.serving.request_totals import RequestTotals, Totals
from exo.worker.protocol.commands import Picture, Text
from exo.worker.protocol.events import Usage
from exo.worker.router import Route

Dialect = Literal["openai", "anthropic", "ollama", "llama-server", "exo"]
"""The API of a request; "exo" is the page."""
Phase = Literal["queued", "loading", "prefill", "decode", "finished", "failed", "cancelled"]
ENDED: tuple[Phase, ...] = ("finished", "failed", "cancelled")

RECENT = 200
"""The records that a server keeps, besides those of requests that have not ended."""
_REPLAYS = 100
_PROMPT_CHARACTERS = 20_000
_MOST_TIMES = 512
_NO_ROUTE = RequestTotals()
"""Takes what requests without a route add; nobody reads it."""


class Mark(NamedTuple):
    """The beginning of a phase, by ``time.monotonic``."""

    phase: Phase
    at: float


@dataclass(frozen=True, slots=True)
class ReplayNote:
    """A request that lost its runner and continues. ``tokens`` of its output had been delivered."""

    number: int
    """Counts a server's replays from 1."""
    request: str
    model: str
    instance: str
    """The runner process that is gone."""
    tokens: int


@dataclass(frozen=True, slots=True)
class RunnerLoss:
    """A request loses its runner after ``tokens`` of output; the time is by ``time.monotonic``."""

    at: float
    instance: str
    tokens: int


@final
class RequestRecord:
    """One request, from its arrival to the end of its reply. Times are in seconds; ``began`` is monotonic."""

    def __init__(self, activity: "Activity", request_id: str, client: str, dialect: Dialect, path: str) -> None:
        self.id = request_id  # printable ASCII without spaces
        self.client = client
        self.dialect: Dialect = dialect
        self.path = path
        self.method = ""
        self.started = time.time()
        self.began = time.monotonic()
        self.model = ""  # a card's model id, so that its values are bounded
        self.sequences = 0
        self.route: Route | None = None
        self.instance = ""
        self.status: int | None = None
        self.error = ""
        self.phase: Phase = "queued"
        self.marks = [Mark("queued", self.began)]
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.finish_reasons: list[str] = []
        self.first_token: float | None = None
        self.routes: list[tuple[float, Route]] = []  # with the time of each
        self.losses: list[RunnerLoss] = []
        self.failovers = 0
        self.prompts: tuple[str, ...] = ()  # their texts, if the activity keeps prompts
        self.version = 0  # set anew by the activity on each change of phase
        self._activity = activity
        self._place: Place | None = None  # of a request that generates text
        self._first_tokens = 0
        self._prefill: dict[int, Prefill] = {}  # the last one of each choice
        self._copies = 1  # choices of each prompt
        self._totals = _NO_ROUTE
        self._token_times: list[float] = []  # of batches with tokens, from the last one that is in the totals on
        self._counted_tokens = 0  # those that are in the totals

    @property
    def replays(self) -> int:
        """How often its runner died and it continued."""
        return len(self.losses)

    @property
    def has_ended(self) -> bool:
        """Whether the request is over."""
        return self.phase in ENDED

    @property
    def prefill_done(self) -> int:
        """Prompt tokens that are computed or were in the cache."""
        done = (each.processed for choice, each in self._prefill.items() if choice % self._copies == 0)
        return self.prompt_tokens if self.has_ended else sum(done)

    @property
    def tokens_in_cache(self) -> int:
        """Tokens of all its sequences for which a runner has computed keys and values."""
        return sum(each.processed for each in self._prefill.values()) + self.completion_tokens

    @property
    def finish_reason(self) -> str | None:
        """That of the choice that finished last."""
        return self.finish_reasons[-1] if self.finish_reasons else None

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of all its choices after the first token; None before there is one."""
        after_first = self.completion_tokens - self._first_tokens
        if self.first_token is None or not after_first or self._token_times[-1] <= self.first_token:
            return None
        return after_first / (self._token_times[-1] - self.first_token)

    @property
    def seconds(self) -> float:
        """The time from its arrival until now, or until its end."""
        return (self.marks[-1].at if self.has_ended else time.monotonic()) - self.began

    def seconds_in(self, phase: Phase) -> float:
        """The time that it has spent in a phase so far."""
        ends = [each.at for each in self.marks[1:]]
        ends.append(self.marks[-1].at if self.has_ended else time.monotonic())
        return sum(end - each.at for each, end in zip(self.marks, ends, strict=True) if each.phase == phase)

    # --- what happens to it ---

    def begin(self, model_id: str, sequences: int, place: Place | None = None, copies: int = 1) -> None:
        """It asks a known model for ``sequences``. With a ``place`` it generates text, ``copies`` of each prompt."""
        self.model, self.sequences, self._place, self._copies = model_id, sequences, place, copies
        self._activity.add(self)

    def routed(self, route: Route) -> None:
        """The router has chosen a runner. This is a failover if the last one was of another kind or on another host."""
        if self.route is not None and self.instance and route.place != self.route.place:
            self.failovers += 1
            self._totals.failovers += 1
        self.settle()
        self.route = route
        self.routes.append((time.monotonic(), route))
        self._totals = self._activity.totals.requests[self.model, route.place, route.backend]
        self._totals.routes[route.criterion] += 1
        self.enter("queued")

    def note_prompts(self, prompts: Iterable[Sequence[Text | Picture] | Sequence[int]]) -> None:
        """Its prompts, of which nothing is kept unless the operator wants them in the log."""
        if self._activity.keeps_prompts:
            self.prompts = tuple(["".join(map(_text, prompt))[:_PROMPT_CHARACTERS] for prompt in prompts])

    def replayed(self, tokens: int) -> None:
        """Its runner has died, and it continues after ``tokens`` of output."""
        self.losses.append(RunnerLoss(time.monotonic(), self.instance, tokens))
        self._totals.replays += 1
        self._totals.replayed_tokens += tokens
        self._activity.note_replay(self, tokens)

    def take(self, batch: Sequence[GenerationEvent]) -> None:
        """Takes events of its generation that have come together."""
        if len(batch) == 1 and isinstance(delta := batch[0], ChoiceDelta) and self.phase == "decode":  # nearly always
            if delta.tokens:
                self.completion_tokens += len(delta.tokens)
                self._token_times.append(time.monotonic())
                if len(self._token_times) > _MOST_TIMES:
                    self.settle()
            return
        tokens = 0
        usage: Usage | None = None
        for event in batch:
            match event:
                case ChoiceDelta():
                    tokens += len(event.tokens)
                case Prefill():
                    self._take_prefill(event)
                case ChoiceStarted():
                    if self._place is None or not self._place.number:
                        self.enter("prefill")
                case ChoiceFinished(reason=reason):
                    self.finish_reasons.append(reason)
                case Completed():
                    usage = event.usage
                case _:
                    pass
        if tokens:
            self._decoded(tokens)
        if usage is not None:
            self.use(usage)
            self.enter("finished")

    def use(self, usage: Usage) -> None:
        """Its tokens are known exactly."""
        self.prompt_tokens, self.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        self.completion_tokens = usage.completion_tokens

    def settle(self) -> None:
        """Adds its tokens to the totals. A scrape does this, too, so that a token itself costs next to nothing."""
        self._totals.generation_tokens += max(0, self.completion_tokens - self._counted_tokens)
        self._counted_tokens = self.completion_tokens
        if len(self._token_times) > 1:
            self._totals.inter_token.observe_all([after - before for before, after in pairwise(self._token_times)])
            del self._token_times[:-1]

    def end(self) -> None:
        """Its reply is over, whole or not."""
        if not self.has_ended:
            refused = bool(self.error) or (self.status or 0) >= 400
            if self.error == "cancelled" or self.status in (None, 499):
                self.enter("cancelled")
            elif refused:
                self.enter("failed")
            else:  # a stream that its client has left has a status
                self.enter("finished" if self._place is None else "cancelled")
        self._add_to_totals()
        self._activity.end(self)

    def _add_to_totals(self) -> None:
        self.settle()
        totals = self._totals
        if self.phase == "failed":
            self._activity.totals.note_refusal(self.error or "internal_error")
        if self.first_token is not None:
            totals.first_token.observe(self.first_token - self.began)
        if self.first_token is not None or self.phase == "finished":
            totals.prompt_tokens += self.prompt_tokens
        if self.phase == "finished" and self.route is not None:
            totals.queried_tokens += self.prompt_tokens
            totals.cached_tokens += self.cached_tokens
            totals.finish_reasons.update(self.finish_reasons)
            totals.whole.observe(self.seconds)
            totals.queue.observe(self.seconds_in("queued"))
            totals.prefill.observe(self.seconds_in("prefill"))
            if self.first_token is not None:
                totals.decode.observe(self.seconds_in("decode"))

    def enter(self, phase: Phase) -> None:
        """The only writer of the phase."""
        if phase != self.phase:
            self.phase = phase
            self.marks.append(Mark(phase, time.monotonic()))
            self._activity.changed(self)

    def _take_prefill(self, event: Prefill) -> None:
        known = self._prefill.get(event.choice)
        self._prefill[event.choice] = event
        if known is None:  # confirms the request, which may have to wait for a slot
            totals = (each.total for choice, each in self._prefill.items() if choice % self._copies == 0)
            self.prompt_tokens = max(self.prompt_tokens, sum(totals))
        elif event.processed > known.processed and self.phase == "queued":
            self.enter("prefill")

    def _decoded(self, tokens: int) -> None:
        now = time.monotonic()
        self.completion_tokens += tokens
        self._token_times.append(now)
        if self.phase != "decode":
            if self.first_token is None:
                self.first_token, self._first_tokens = now, tokens
            self.enter("decode")


def _text(part: Text | Picture | int) -> str:
    if isinstance(part, Picture):
        return "<picture>"
    return f"<{part}>" if isinstance(part, int) else part.text


@final
class Activity:
    """The records of the requests that have not ended, and of the last ones that have."""

    def __init__(self, *, keeps_prompts: bool = False) -> None:
        self.keeps_prompts = keeps_prompts
        self.version = 0  # changes of phases and replays so far
        self.totals = Totals()
        self.replays: deque[ReplayNote] = deque(maxlen=_REPLAYS)
        self._running: dict[RequestRecord, None] = {}
        self._ended: deque[RequestRecord] = deque(maxlen=RECENT)
        self._n_replays = 0
        self._change: asyncio.Event | None = None  # there is one while somebody waits

    @property
    def running(self) -> Iterable[RequestRecord]:
        """Those that have not ended, the oldest first."""
        return self._running

    def __iter__(self) -> Iterator[RequestRecord]:
        """Those that run and then those that have ended, each time the newest first."""
        yield from reversed(self._running)
        yield from reversed(self._ended)

    def add(self, record: RequestRecord) -> None:
        """A request has begun."""
        self._running[record] = None
        self.changed(record)

    def end(self, record: RequestRecord) -> None:
        """A request is over. One that never began is kept if it was refused, unless its client had no access."""
        began = self._running.pop(record, self) is None
        if began or (record.phase == "failed" and record.status not in (401, 403)):
            self._ended.append(record)
            self.changed(record)

    def changed(self, record: RequestRecord) -> None:
        """A request has entered another phase."""
        self.version += 1
        record.version = self.version
        self._wake()

    def note_replay(self, record: RequestRecord, tokens: int) -> None:
        """A request continues on another runner."""
        self._n_replays += 1
        self.version += 1
        self.replays.append(ReplayNote(self._n_replays, record.id, record.model, record.instance, tokens))
        self._wake()

    async def wait(self, version: int) -> None:
        """Waits until a phase has changed, or a request was replayed, since ``version``."""
        if self.version == version:
            self._change = self._change or asyncio.Event()
            await self._change.wait()

    def _wake(self) -> None:
        if self._change is not None:
            self._change.set()
            self._change = None


_current: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


def current_record() -> RequestRecord:
    """The record of the request that the present task serves; an unlisted one in a task that serves none."""
    return _current.get() or RequestRecord(Activity(), "", "", "openai", "")


def current_request_id() -> str:
    """The id of the request that the present task serves; empty in a task that serves none."""
    return "" if (record := _current.get()) is None else record.id


def set_current(record: RequestRecord) -> None:
    """Makes ``record`` that of the present task and of those that it starts."""
    _current.set(record)
