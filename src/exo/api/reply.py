"""How a generation's events reach its client: as one reply or as a stream, until the client leaves."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio
from anyio.abc import TaskGroup
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from exo.api import sse
from exo.api.errors import INTERNAL_ERROR, ApiError, ErrorBody
from exo.api.generation import Generation, total_usage
from exo.worker.messages import Capabilities, Delta, Finished, FinishReason, PrefillProgress, Status, Usage

log = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
"""How long a stream waits for its first event, so that an early failure still gets an HTTP status."""
KEEP_ALIVE_SECONDS = 10.0
PLACE_SECONDS = 0.5
"""How soon after one place in the queue a client is told the next."""


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    text: str
    reason: FinishReason


class Dialect(Protocol):
    """One API's words for a reply. The bytes are whole JSON documents, or whole server-sent events."""

    def serving(self, model_id: str, fingerprint: str) -> None:
        """Called once, before all else."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The reply to a request that does not stream."""
        ...

    def opening(self, choice: int) -> bytes:
        """The beginning of a choice, before its text."""
        ...

    def text(self, choice: int, text: str) -> bytes:
        """More text, never empty."""
        ...

    def finish(self, choice: int, reason: FinishReason) -> bytes:
        """The end of a choice."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The end of a stream in which every choice has finished."""
        ...

    def error(self, body: ErrorBody) -> bytes:
        """The end of a stream that failed."""
        ...


def _fingerprint(capabilities: Capabilities) -> str:
    return f"{capabilities.engine}-{capabilities.engine_version}"


class GenerationReply(Response):
    """Runs the generation while it replies, so that all of it ends within a moment when the client leaves."""

    def __init__(self, generation: Generation, dialect: Dialect, *, stream: bool) -> None:
        super().__init__()
        self._generation = generation
        self._dialect = dialect
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replies, as ASGI has it."""

        async def respond(response: Response) -> None:
            await response(scope, receive, send)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_client_leaves, receive, tasks)
            if self._stream:
                stream = _Stream(self._generation, self._dialect, send)
                tasks.start_soon(stream.keep_alive)
                tasks.start_soon(stream.tell_place)
                error = await self._run(stream)
                if error is not None and stream.abandon():
                    await respond(error.response(self._generation.headers))
                else:
                    await stream.close(error)
            else:
                whole = _Whole()
                error = await self._run(whole)
                await respond(error.response(self._generation.headers) if error else self._complete(whole))
            tasks.cancel_scope.cancel()

    async def _run(self, sink: "_Stream | _Whole") -> ErrorBody | None:
        try:
            await self._generation.run(sink)
        except ApiError as error:
            return error.body
        except Exception:
            log.exception("request %s failed", self._generation.id)
            return INTERNAL_ERROR
        return None

    def _complete(self, whole: "_Whole") -> Response:
        request = self._generation.request
        assert whole.capabilities is not None
        self._dialect.serving(whole.model_id, _fingerprint(whole.capabilities))
        choices = [whole.choices[choice] for choice in range(request.choices)]
        body = self._dialect.whole(choices, total_usage(whole.usages, request.n))
        return Response(body, headers=dict(self._generation.headers), media_type="application/json")


async def _cancel_when_client_leaves(receive: Receive, tasks: TaskGroup) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    tasks.cancel_scope.cancel()


@dataclass(slots=True)
class _Whole:
    """Collects a reply that is sent in one piece."""

    model_id: str = ""
    capabilities: Capabilities | None = None
    texts: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    usages: dict[int, Usage] = field(default_factory=dict[int, Usage])

    async def loading(self, status: Status) -> None:
        """Nothing to tell yet."""

    def serving(self, model_id: str, capabilities: Capabilities) -> None:
        self.model_id, self.capabilities = model_id, capabilities

    async def event(self, choice: int, event: PrefillProgress | Delta | Finished) -> None:
        if isinstance(event, PrefillProgress):
            return
        texts = self.texts.setdefault(choice, [])
        texts.append(event.text)
        if isinstance(event, Finished):
            self.choices[choice] = Choice("".join(texts), event.reason)
            self.usages[choice] = event.usage


class _Stream:
    """Writes a stream. Until it is opened, what is written is held back, so that an error can still take its place.

    It opens when every choice has been accepted, or when the grace is over.
    """

    def __init__(self, generation: Generation, dialect: Dialect, send: Send) -> None:
        self._generation = generation
        self._dialect = dialect
        self._send = send
        self._started = False
        self._starting = anyio.Lock()
        self._open = False
        self._held: list[bytes] = []
        self._note = b""
        self._place_note = b""
        self._waiting = True
        self._quiet = True
        self._accepted: set[int] = set()
        self._usages: dict[int, Usage] = {}

    async def loading(self, status: Status) -> None:
        layers = f" {status.layers_loaded}/{status.total_layers}" if status.total_layers else ""
        note = sse.comment(f"{status.state.lower()}{layers}")
        if note != self._note:
            self._note = note
            if self._open:
                await self._write(note)

    def serving(self, model_id: str, capabilities: Capabilities) -> None:
        self._note = b""
        self._dialect.serving(model_id, _fingerprint(capabilities))

    async def event(self, choice: int, event: PrefillProgress | Delta | Finished) -> None:
        data = b""
        if not isinstance(event, PrefillProgress) or event.processed:
            self._waiting, self._place_note = False, b""
        if choice not in self._accepted:
            self._accepted.add(choice)
            data = self._dialect.opening(choice)
        if not isinstance(event, PrefillProgress):
            if event.text:
                data += self._dialect.text(choice, event.text)
            if isinstance(event, Finished):
                data += self._dialect.finish(choice, event.reason)
                self._usages[choice] = event.usage
        if data:
            await self._write(data)
        if not self._open and len(self._accepted) == self._generation.request.choices:
            await self._start()

    async def keep_alive(self) -> None:
        """Opens the stream after the grace, then fills every long silence."""
        await self._generation.routed.wait()  # the headers tell the route
        await anyio.sleep(GRACE_SECONDS)
        await self._start()
        while True:
            self._quiet = True
            await anyio.sleep(KEEP_ALIVE_SECONDS)
            if self._quiet:
                await self._write(sse.KEEP_ALIVE)

    async def tell_place(self) -> None:
        """Writes the place in the queue while there is no slot yet."""
        await self._generation.routed.wait()
        number = 0
        while self._waiting:
            number = await self._generation.place.number_after(number)
            if self._waiting:
                self._place_note = sse.comment(f"queued {number}") if number else b""
                if self._open and number:
                    await self._write(self._place_note)
            await anyio.sleep(PLACE_SECONDS)

    def abandon(self) -> bool:
        """Whether nothing has been sent yet; then nothing will be, and another reply can take its place."""
        untouched, self._started = not self._started, True
        return untouched

    async def close(self, error: ErrorBody | None) -> None:
        """Ends the stream, opening it first if need be."""
        await self._start()
        if error is None:
            last = self._dialect.end(total_usage(self._usages, self._generation.request.n))
        else:
            last = self._dialect.error(error)
        self._open = False  # so that nothing else follows, however long this has to wait
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write(self, data: bytes) -> None:
        if self._open:
            self._quiet = False
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        else:
            self._held.append(data)

    async def _start(self) -> None:
        async with self._starting:
            if self._started:
                return
            self._started = True
            headers = {"content-type": sse.MEDIA_TYPE, **sse.HEADERS, **self._generation.headers}
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
            self._held.insert(0, self._note + self._place_note)
            while data := b"".join(self._held):
                self._held.clear()
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._open = True
