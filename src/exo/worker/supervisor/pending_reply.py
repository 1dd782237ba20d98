"""What ``RunnerProcess.ask`` waits for: the one event that ends a request which has no stream."""

import asyncio
from itertools import chain
from typing import final

from exo.worker.protocol.messages import (
    Embed,
    Embedded,
    Failed,
    Finished,
    PrefillProgress,
    Rank,
    Ranked,
    Tokenize,
    Tokenized,
)

UnaryRequest = Embed | Rank | Tokenize
"""Commands without side effects: one whose runner died may be asked again, of another."""
UnaryReply = Embedded | Ranked | Tokenized

REPLY_TYPES: dict[type[UnaryRequest], type[UnaryReply]] = {Embed: Embedded, Rank: Ranked, Tokenize: Tokenized}


@final
class PendingReply:
    """For one reader. ``kind`` is the event that answers; ``Failed`` ends it too, ``Finished`` if it is cancelled."""

    def __init__(self, kind: type[UnaryReply]) -> None:
        self.kind = kind
        self._parts: list[Tokenized] = []
        self._event: UnaryReply | Finished | Failed | None = None
        self._arrived = asyncio.Event()

    def put(self, event: UnaryReply | PrefillProgress | Finished | Failed) -> None:
        """Takes an event; progress is of no interest here."""
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
                self._event = event.model_copy(update={"tokens": tokens, "bytes": spelt})
            case _:
                self._event = event
        self._arrived.set()

    async def wait(self) -> UnaryReply | Finished | Failed:
        """The event that ended the request."""
        await self._arrived.wait()
        assert self._event is not None
        return self._event
