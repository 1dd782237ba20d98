"""The events of one request on their way from the runner's pipe to whoever answers the client."""

import asyncio
from collections import deque
from typing import Self, final

from exo.worker.protocol.messages import Delta, Failed, Finished, PrefillProgress, PromptLogprobs

RequestEvent = PrefillProgress | PromptLogprobs | Delta | Finished | Failed

_BOUND = 1024
"""Events buffered before they are compacted."""


@final
class RequestEvents:
    """An asynchronous iterator for one reader: it ends after exactly one ``Finished`` or ``Failed``.

    Writing never waits, because the reader of a runner's pipe serves all its requests and must not be held up by one
    slow client. A reader that lags gets fewer and larger deltas instead: a full buffer is compacted, so that what it
    holds is bounded by the tokens of one sequence, that is by the model's context length, and nothing is lost.
    """

    def __init__(self) -> None:
        self._buffer: deque[RequestEvent] = deque()
        self._arrival: asyncio.Future[None] | None = None
        """What the reader waits for."""
        self._open = True

    def put(self, event: RequestEvent) -> None:
        """Adds an event. Called by the runner's process only, and not again after a terminal event."""
        if not self._open:
            return
        self._buffer.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        if len(self._buffer) >= _BOUND:
            self._compact()

    @property
    def pending(self) -> bool:
        """Whether the next event is here already."""
        return bool(self._buffer)

    def discard(self) -> None:
        """Drops what is buffered and whatever still comes: the reader has left."""
        self._open = False
        self._buffer.clear()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestEvent:
        """Waits only while the buffer is empty; cancelling the wait loses nothing."""
        while not self._buffer:
            if not self._open:
                raise StopAsyncIteration
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        event = self._buffer.popleft()
        if isinstance(event, Finished | Failed):
            self._open = False
        return event

    def _compact(self) -> None:
        """All deltas become one, as do the parts of the prompt's log-probabilities; the last progress is kept."""
        events = tuple(self._buffer)
        deltas = [event for event in events if isinstance(event, Delta)]
        self._buffer.clear()
        self._buffer.extend([event for event in events if isinstance(event, PrefillProgress)][-1:])
        prompts = [event for event in events if isinstance(event, PromptLogprobs)]
        if prompts:
            items = tuple(item for event in prompts for item in event.items)
            self._buffer.append(prompts[0].model_copy(update={"items": items}))
        if deltas:
            tokens = tuple(token for delta in deltas for token in delta.tokens)
            logprobs = tuple(each for delta in deltas for each in delta.logprobs)
            text = "".join(delta.text for delta in deltas)
            self._buffer.append(Delta(id=deltas[0].id, tokens=tokens, text=text, logprobs=logprobs))
        self._buffer.extend(event for event in events if isinstance(event, Finished | Failed))
