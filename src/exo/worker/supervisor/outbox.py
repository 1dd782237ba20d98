"""Requests on their way to a runner: they wait while its pipe is full, and sequences of one prompt go together."""

import asyncio
from collections.abc import Callable
from typing import Protocol, final

from exo.worker.protocol.messages import LINE_BYTES, Embed, Failed, Generate, Rank, Request, Sibling, Tokenize
from exo.worker.protocol.wire import encode

_LARGE = 1 << 14
"""Characters or token ids of a prompt that is worth a moment's wait for others that have it too."""


class Pipe(Protocol):
    """What leads to the runner. ``child.Child`` is one."""

    writable: asyncio.Event
    """Set while little is on its way."""

    def write(self, line: bytes) -> None:
        """Writes a line, or has the loop write it when there is room; never waits for that."""
        ...


@final
class Outbox:
    """Holds requests as objects, of which those with the same prompt share it, until the pipe takes them.

    What is written besides passes by all that wait here. ``sending`` is told each request as it is written, and
    ``refuse`` why one cannot be. ``run`` must run for as long as requests are posted.
    """

    def __init__(self, pipe: Pipe, sending: Callable[[Request], None], refuse: Callable[[Failed], None]) -> None:
        self._pipe = pipe
        self._sending = sending
        self._refuse = refuse
        self._waiting: dict[str, Request] = {}
        """By id, in the order of their arrival."""
        self._posted = asyncio.Event()

    def post(self, request: Request) -> None:
        """Takes a request, and writes it at once where nothing is in its way."""
        self._waiting[request.id] = request
        if len(self._waiting) == 1 and self._pipe.writable.is_set() and _size(request) < _LARGE:
            self._write_next()
        else:
            self._posted.set()

    def withdraw(self, request: str) -> bool:
        """Drops a request that has not been written; false if it has."""
        return self._waiting.pop(request, None) is not None

    async def run(self) -> None:
        """Writes what waits whenever there is room. Does not return."""
        while True:
            await self._posted.wait()
            await self._pipe.writable.wait()
            if self._waiting:
                self._write_next()
            else:
                self._posted.clear()

    def _write_next(self) -> None:
        first = next(iter(self._waiting.values()))
        siblings = [each for each in self._waiting.values() if each is not first and _is_sibling(first, each)]
        for request in (first, *siblings):
            del self._waiting[request.id]
        line = encode(_joined(first, siblings))
        if len(line) <= LINE_BYTES:
            for request in (first, *siblings):
                self._sending(request)
            self._pipe.write(line)
            return
        message = f"the request takes {len(line)} bytes on its way to the runner; at most {LINE_BYTES} are accepted"
        for request in (first, *siblings):
            self._refuse(Failed(id=request.id, code="invalid_request", message=message))


def _size(request: Request) -> int:
    match request:
        case Rank():
            return len(request.query) + len(request.document)
        case Generate() | Embed() | Tokenize():
            return sum(1 if isinstance(part, int) else len(part.text) for part in request.prompt)


def _is_sibling(first: Request, other: Request) -> bool:
    """Whether two requests differ in nothing but id and seed, and have one prompt between them."""
    if not (isinstance(first, Generate) and isinstance(other, Generate)):
        return False
    if first.prompt is not other.prompt or first.delivered:
        return False
    sampling = first.sampling.model_copy(update={"seed": other.sampling.seed})
    return first.model_copy(update={"id": other.id, "sampling": sampling}) == other


def _joined(first: Request, siblings: list[Request]) -> Request:
    also = tuple(Sibling(id=each.id, seed=each.sampling.seed) for each in siblings if isinstance(each, Generate))
    return first.model_copy(update={"also": also}) if also else first
