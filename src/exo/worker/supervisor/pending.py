"""Requests that a runner has not answered yet: each has a stream of events, or waits for one reply."""

import asyncio
from collections import deque
from itertools import chain
from typing import Self, final

from exo.worker.protocol.messages import (
    Delta,
    Embed,
    Embedded,
    Failed,
    Finished,
    PrefillProgress,
    PromptLogprobs,
    Rank,
    Ranked,
    Tokenize,
    Tokenized,
)

RequestEvent = PrefillProgress | PromptLogprobs | Delta | Finished | Failed

UnaryRequest = Embed | Rank | Tokenize
"""Commands with one reply and no side effects: after a runner's death another one may be asked."""
UnaryReply = Embedded | Ranked | Tokenized
REPLY_TYPES: dict[type[UnaryRequest], type[UnaryReply]] = {Embed: Embedded, Rank: Ranked, Tokenize: Tokenized}

_BOUND = 1024
"""Buffered events that cause a compaction."""


@final
class RequestEvents:
    """An asynchronous iterator for one reader: it ends after exactly one ``Finished`` or ``Failed``.

    Writing never waits, because the reader of a runner's pipe serves all its requests, and one slow client must not
    hold it up. A reader that lags gets fewer and larger deltas: a full buffer is compacted. It holds at most the
    tokens of one sequence, which the context length bounds, and loses nothing.
    """

    def __init__(self, arrival: asyncio.Event | None = None) -> None:
        """``arrival`` is set with each event. Several requests may share it, whose reader then calls ``take``."""
        self._buffer: deque[RequestEvent] = deque()
        self._arrival = asyncio.Event() if arrival is None else arrival
        self._open = True

    def put(self, event: RequestEvent) -> None:
        """Adds an event. Nothing may follow a terminal event."""
        if not self._open:
            return
        self._buffer.append(event)
        self._arrival.set()
        if len(self._buffer) >= _BOUND:
            self._compact()

    def take(self) -> list[RequestEvent]:
        """Returns the events that have arrived."""
        events = list(self._buffer)
        self._buffer.clear()
        return events

    def discard(self) -> None:
        """Drops the buffered events and all later ones: the reader has left."""
        self._open = False
        self._buffer.clear()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestEvent:
        """Waits only while the buffer is empty. Cancelling the wait loses nothing."""
        while not self._buffer:
            if not self._open:
                raise StopAsyncIteration
            self._arrival.clear()
            await self._arrival.wait()
        event = self._buffer.popleft()
        if isinstance(event, Finished | Failed):
            self._open = False
        return event

    def _compact(self) -> None:
        """Joins all deltas, joins the prompt's log-probabilities, and keeps the last progress and the terminal event.

        That order is the order in which a runner sends them.
        """
        events = tuple(self._buffer)
        deltas = [event for event in events if isinstance(event, Delta)]
        prompts = [event for event in events if isinstance(event, PromptLogprobs)]
        self._buffer.clear()
        self._buffer.extend([event for event in events if isinstance(event, PrefillProgress)][-1:])
        if prompts:
            items = tuple(item for event in prompts for item in event.items)
            self._buffer.append(prompts[0].model_copy(update={"items": items}))
        if deltas:
            tokens = tuple(token for delta in deltas for token in delta.tokens)
            logprobs = tuple(each for delta in deltas for each in delta.logprobs)
            text = "".join(delta.text for delta in deltas)
            self._buffer.append(Delta(id=deltas[0].id, tokens=tokens, text=text, logprobs=logprobs))
        self._buffer.extend(event for event in events if isinstance(event, Finished | Failed))


@final
class PendingReply:
    """Waits for the reply of type ``kind``, or for ``Failed``, or for ``Finished`` after a cancellation."""

    def __init__(self, kind: type[UnaryReply]) -> None:
        self.kind = kind
        self._parts: list[Tokenized] = []
        self._reply: asyncio.Future[UnaryReply | Finished | Failed] = asyncio.get_running_loop().create_future()

    def put(self, event: UnaryReply | PrefillProgress | Finished | Failed) -> None:
        """Takes an event. Progress is ignored; the parts of a ``Tokenized`` are joined."""
        match event:
            case PrefillProgress():
                return
            case Tokenized(more=True):
                self._parts.append(event)
                return
            case Tokenized() if self._parts:
                parts = [*self._parts, event]
                tokens = tuple(chain.from_iterable(part.tokens for part in parts))
                spelt = tuple(chain.from_iterable(part.bytes for part in parts))
                event = event.model_copy(update={"tokens": tokens, "bytes": spelt})
            case _:
                pass
        if not self._reply.done():
            self._reply.set_result(event)

    async def wait(self) -> UnaryReply | Finished | Failed:
        """The event that ended the request."""
        return await self._reply
