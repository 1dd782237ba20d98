"""Requests on their way to a runner: they wait while its pipe is full, and sequences with one prompt go together."""

import asyncio
from collections.abc import Callable
from typing import final

from exo.worker.protocol.messages import LINE_BYTES, Embed, Failed, Generate, Rank, Request, Sibling, Tokenize
from exo.worker.protocol.wire import encode
from exo.worker.supervisor.child_process import ChildProcess

_LARGE = 1 << 14
"""Characters or token ids from which a prompt is worth a moment's wait for other sequences with the same one."""


@final
class Outbox:
    """Holds requests as objects, which share their prompt, until the pipe has room. Other commands overtake them.

    ``sending`` is called with each request as it is written, ``refuse`` with the failure of one that is too large.
    """

    def __init__(
        self, child: ChildProcess, sending: Callable[[Request], None], refuse: Callable[[Failed], None]
    ) -> None:
        self._child = child
        self._sending = sending
        self._refuse = refuse
        self._waiting: dict[str, Request] = {}  # by id, in order of arrival
        self._posted = asyncio.Event()

    def post(self, request: Request) -> None:
        """Takes a request. Writes it at once if it is small and nothing is in its way."""
        self._waiting[request.id] = request
        if len(self._waiting) == 1 and self._child.writable.is_set() and _size(request) < _LARGE:
            self._write_next()
        else:
            self._posted.set()

    def withdraw(self, request: str) -> bool:
        """Drops a request that has not been written; false if it has."""
        return self._waiting.pop(request, None) is not None

    async def run(self) -> None:
        """Writes waiting requests whenever there is room. Does not return."""
        while True:
            await self._posted.wait()
            await self._child.writable.wait()
            if self._waiting:
                self._write_next()
            else:
                self._posted.clear()

    def _write_next(self) -> None:
        first = next(iter(self._waiting.values()))
        siblings = [each for each in self._waiting.values() if each is not first and _is_sibling(first, each)]
        requests = (first, *siblings)
        for request in requests:
            del self._waiting[request.id]
        also = tuple(Sibling(id=each.id, seed=each.sampling.seed) for each in siblings if isinstance(each, Generate))
        line = encode(first.model_copy(update={"also": also}) if also else first)
        if len(line) <= LINE_BYTES:
            for request in requests:
                self._sending(request)
            self._child.write(line)
            return
        message = f"the request takes {len(line)} bytes on its way to the runner; at most {LINE_BYTES} are accepted"
        for request in requests:
            self._refuse(Failed(id=request.id, code="invalid_request", message=message))


def _size(request: Request) -> int:
    match request:
        case Rank():
            return len(request.query) + len(request.document)
        case Generate() | Embed() | Tokenize():
            return sum(1 if isinstance(part, int) else len(part.text) for part in request.prompt)


def _is_sibling(first: Request, other: Request) -> bool:
    """Whether two requests share one prompt object and differ in nothing but id and seed."""
    if not (isinstance(first, Generate) and isinstance(other, Generate)):
        return False
    if first.prompt is not other.prompt or first.delivered:
        return False
    sampling = first.sampling.model_copy(update={"seed": other.sampling.seed})
    return first.model_copy(update={"id": other.id, "sampling": sampling}) == other
