"""Sends the events of a generation to its client, in one piece or as a stream."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import anyio
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from exo.api.http import sse
from exo.api.http.error_reply import error_reply
from exo.api.http.errors import INTERNAL_ERROR, ErrorBody, error_body
from exo.api.http.reply import ReplyChoice
from exo.api.http.unary_response import cancel_when_client_leaves
from exo.serving.errors import ServingError
from exo.serving.events import (
    ChoiceDelta,
    ChoiceFinished,
    ChoicePrompt,
    ChoiceStarted,
    Completed,
    GenerationEvent,
    Loading,
    Prefill,
    Routed,
    Started,
)
from exo.worker.protocol.events import Usage
from exo.worker.router import Route

if TYPE_CHECKING:
    from exo.serving.generation import Generation

log = logging.getLogger(__name__)

_QUICK_SECONDS = 0.05
"""A faster reply needs no task that watches the client or the time."""
GRACE_SECONDS = 1.0
"""The time that a stream waits for its first event, so that an early error still gets an HTTP status."""
HELD_SECONDS = 50.0
"""The same for a long request, because its prompt may exceed the context, which is known once the model is loaded.
Agents expect a status then. Proxies wait for a minute."""
SHORT_REQUEST = 4096
"""Bytes of a body whose prompt fits every usual context."""
PLACE_SECONDS = 0.5
"""The minimum time between two notes of the place in the queue."""


def route_headers(route: Route | Routed) -> dict[str, str]:
    """The headers with the runner that serves the request, its host if that is another machine, and the reason."""
    headers = {"x-exo-runner": route.runner, "x-exo-route": route.reason}
    return headers | {"x-exo-host": route.host} if route.host else headers


class Dialect(Protocol):
    """One API's form of a reply. The bytes are whole JSON documents, or whole events of a stream."""

    media_type: str

    def write(self, event: GenerationEvent) -> bytes:
        """The bytes of the next event in a stream. ``Started`` has none, but is passed for a whole reply, too."""
        ...

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        """The reply to a request that does not stream."""
        ...

    def error(self, body: ErrorBody) -> bytes:
        """The end of a stream that has failed."""
        ...

    def note(self, text: str) -> bytes:
        """A text for people, which programs skip; empty if the API has no place for it."""
        ...


class GenerationResponse(Response):
    """Runs the generation while it replies, and cancels it when the client leaves.

    ``headers`` are further headers. ``during`` is a context in which all of that happens.
    """

    def __init__(
        self,
        generation: "Generation",
        dialect: Dialect,
        *,
        stream: bool,
        headers: Mapping[str, str] | None = None,
        during: AbstractAsyncContextManager[None] | None = None,
    ) -> None:
        super().__init__()
        self._generation = generation
        self._dialect = dialect
        self._stream = stream
        self._headers = dict(headers or {})
        self._during = nullcontext() if during is None else during

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        over = asyncio.Event()
        grace = HELD_SECONDS if _is_long(scope) else GRACE_SECONDS
        stream = _Stream(self._generation, self._dialect, self._headers, send, grace) if self._stream else None

        async def reply() -> None:
            response = await (self._whole() if stream is None else self._streamed(stream))
            if response is not None:
                await response(scope, receive, send)
            over.set()

        async with self._during, anyio.create_task_group() as tasks:
            # Each batch of events resumes this task alone, and not the applications around it.
            tasks.start_soon(reply)
            await asyncio.sleep(0)  # it goes first
            with anyio.move_on_after(_QUICK_SECONDS):
                await over.wait()
            if not over.is_set():
                tasks.start_soon(cancel_when_client_leaves, receive, tasks)
                if stream is not None:
                    tasks.start_soon(stream.keep_alive)
                    tasks.start_soon(stream.write_places)
                await over.wait()
                tasks.cancel_scope.cancel()

    async def _streamed(self, stream: "_Stream") -> Response | None:
        """Streams the reply. Returns an error that comes before anything is sent."""
        error = await self._run(stream)
        if error is not None and stream.abandon():
            return error_reply(error, self._headers)
        await stream.close(error)
        return None

    async def _whole(self) -> Response:
        whole = _Whole(self._dialect, self._headers)
        error = await self._run(whole)
        if error is not None:
            return error_reply(error, self._headers)
        choices = [whole.choices[number] for number in range(self._generation.n_choices)]
        body = self._dialect.whole(choices, whole.usage)
        return Response(body, headers=self._headers, media_type="application/json")

    async def _run(self, output: "_Stream | _Whole") -> ErrorBody | None:
        try:
            async with self._generation.running() as batches:
                async for batch in batches:
                    self._generation.record.take(batch)
                    for event in batch:
                        output.take(event)
                    await output.flush()
        except ServingError as error:
            return error_body(error)
        except Exception:
            log.exception("request %s failed", self._generation.id)
            return INTERNAL_ERROR
        return None


class _Whole:
    """Collects a reply that is sent in one piece."""

    def __init__(self, dialect: Dialect, headers: dict[str, str]) -> None:
        self.choices: defaultdict[int, ReplyChoice] = defaultdict(ReplyChoice)
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._dialect = dialect
        self._headers = headers

    def take(self, event: GenerationEvent) -> None:
        match event:
            case ChoicePrompt() | ChoiceDelta() | ChoiceFinished():
                self.choices[event.choice].add(event)
            case Routed():
                self._headers.update(route_headers(event))
            case Started():
                self._dialect.write(event)
            case Completed():
                self.usage = event.usage
            case _:
                pass

    async def flush(self) -> None:
        """Nothing is sent before the end."""


class _Stream:
    """Writes a stream. Nothing is sent until it opens, so that an early error still gets an HTTP status.

    It opens with the first output after every choice has been accepted. Without output, it opens a moment after that
    or when the grace period is over.
    """

    def __init__(
        self, generation: "Generation", dialect: Dialect, headers: dict[str, str], send: Send, grace_seconds: float
    ) -> None:
        self._generation = generation
        self._dialect = dialect
        self._headers = headers
        self._send = send
        self._grace_seconds = grace_seconds
        self._routed = asyncio.Event()
        self._started = False
        self._starting = anyio.Lock(fast_acquire=True)
        self._open = False
        self._held: list[bytes] = []
        self._note = b""
        self._place_note = b""
        self._queued = True
        self._has_output = False
        self._completed = False
        self._quiet = True
        self._n_accepted = 0
        self._all_accepted = asyncio.Event()

    def take(self, event: GenerationEvent) -> None:
        """Holds the bytes of an event for ``flush``."""
        match event:
            case ChoiceDelta() | ChoicePrompt() | ChoiceFinished():
                if not self._has_output:
                    self._has_output = True
                    self._leave_queue()
            case Prefill():
                if event.processed:
                    self._leave_queue()
                return
            case ChoiceStarted():
                self._n_accepted += 1
                if self._n_accepted == self._generation.n_choices:
                    self._all_accepted.set()
            case Loading():
                if (comment := self._dialect.note(event.note)) != self._note:
                    self._note = comment
                    if self._open:
                        self._held.append(comment)
                return
            case Routed():
                self._headers.update(route_headers(event))
                self._routed.set()
                return
            case Started():
                self._note = b""
            case Completed():
                self._completed = True
        self._held.append(self._dialect.write(event))

    def _leave_queue(self) -> None:
        self._queued, self._place_note = False, b""

    async def flush(self) -> None:
        """Sends the bytes that are held, or opens the stream with them if it is time."""
        if self._completed:
            return  # ``close`` follows at once and sends them
        if self._open:
            await self._send_held()
        elif self._has_output and self._all_accepted.is_set():
            await self._start()

    async def keep_alive(self) -> None:
        """Opens the stream when it is accepted or the grace period is over, then writes a comment in every silence."""
        await self._routed.wait()  # the headers contain the route
        with anyio.move_on_after(self._grace_seconds):
            await self._all_accepted.wait()
        await self._start()
        while True:
            self._quiet = True
            await anyio.sleep(sse.KEEP_ALIVE_SECONDS)
            if self._quiet:
                await self._write(self._dialect.note("keep-alive"))

    async def write_places(self) -> None:
        """Writes the place in the queue whenever it changes, until there is a slot."""
        await self._routed.wait()
        number = 0
        while self._queued:
            number = await self._generation.place.number_after(number)
            if self._queued:
                self._place_note = self._dialect.note(f"queued {number}") if number else b""
                if self._open and number:
                    await self._write(self._place_note)
            await anyio.sleep(PLACE_SECONDS)

    def abandon(self) -> bool:
        """Returns whether nothing has been sent. Then nothing will be, and another reply can take its place."""
        untouched, self._started = not self._started, True
        return untouched

    async def close(self, error: ErrorBody | None) -> None:
        """Ends the stream. Opens it first if necessary."""
        await self._start()
        if error is not None:
            self._generation.record.error = error.code
            self._held.append(self._dialect.error(error))
        self._open = False  # nothing else may follow, however long the client takes
        await self._send({"type": "http.response.body", "body": b"".join(self._held), "more_body": False})

    async def _write(self, data: bytes) -> None:
        self._held.append(data)
        if self._open:
            await self._send_held()

    async def _send_held(self) -> None:
        data = b"".join(self._held)
        self._held.clear()
        if data:
            self._quiet = False
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _start(self) -> None:
        async with self._starting:
            if self._started:
                return
            self._started = True
            headers = {"content-type": self._dialect.media_type, **sse.HEADERS, **self._headers}
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
            self._held.insert(0, self._note + self._place_note)
            while any(self._held):
                await self._send_held()
            self._open = True


def _is_long(scope: Scope) -> bool:
    length = Headers(scope=scope).get("content-length", "")
    return not length.isdecimal() or int(length) > SHORT_REQUEST
