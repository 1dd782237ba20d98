"""How a generation's events reach its client: as one reply or as a stream, until the client leaves."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import anyio
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from exo.api.http import sse
from exo.api.http.errors import INTERNAL_ERROR, ErrorBody, error_body
from exo.api.http.unary_response import cancel_when_client_leaves
from exo.chat.output.events import Arguments, BrokenCall, Content, Reasoning, ToolCall
from exo.serving.errors import ServingError
from exo.serving.generation import Generation, Serving
from exo.serving.output_reader import ChoiceEvent, Ended, Reason, Said, total_usage
from exo.worker.protocol.messages import PrefillProgress, PromptLogprobs, TokenLogprobs, Usage

log = logging.getLogger(__name__)

_QUICK_SECONDS = 0.05
"""A reply that takes no longer needs nobody who watches its client, or the time."""
GRACE_SECONDS = 1.0
"""How long a stream waits for its first event, so that an early failure still gets an HTTP status."""
KEEP_ALIVE_SECONDS = 10.0
PLACE_SECONDS = 0.5
"""How soon after one place in the queue a client is told the next."""


@dataclass(slots=True)
class Call:
    """One call of a tool. ``arguments`` is a JSON object, or the beginning of one where the call is not ``whole``."""

    name: str
    arguments: str = ""
    whole: bool = True


@dataclass(slots=True)
class ReplyChoice:
    """One finished choice; of what was not asked for there is nothing."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list[Call])
    reason: Reason = "stop"
    stop: str | None = None
    """The stop string that ended it."""
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    began: int = 0
    """When there was a first token, by ``time.monotonic_ns``; 0 where there is none."""
    usage: Usage = field(default_factory=partial(Usage, prompt_tokens=0, completion_tokens=0))

    reasoning_tokens: int = 0

    def add(self, event: PromptLogprobs | Said | Ended) -> None:
        """Takes the next event of the choice."""
        if isinstance(event, PromptLogprobs):
            self.prompt_logprobs += event.items
            return
        for part in event.parts:
            match part:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCall(_, name):
                    self.calls.append(Call(name))
                case Arguments(index, text):
                    self.calls[index].arguments += text
                case BrokenCall(index, _):
                    self.calls[index].whole = False
        if isinstance(event, Said):
            self.began = self.began or time.monotonic_ns()
            self.tokens += event.tokens
            self.logprobs += event.logprobs
        else:
            self.reason, self.stop, self.usage = event.reason, event.stop, event.usage
            self.reasoning_tokens = event.reasoning_tokens
            self._withdraw()

    def _withdraw(self) -> None:
        """Takes broken calls back, whose text is content. One that the limit cut off stays, as the beginning it is."""
        if self.reason == "length" or all(call.whole for call in self.calls):
            return
        self.calls = [call for call in self.calls if call.whole]
        if self.calls:
            self.reason = "tool_calls"


class Dialect(Protocol):
    """One API's words for a reply. The bytes are whole JSON documents, or whole events of a stream."""

    media_type: str
    """Of a stream."""

    def serving(self, serving: Serving) -> None:
        """Called once, before all else, when the model is loaded."""
        ...

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        """The reply to a request that does not stream."""
        ...

    def opening(self, choice: int, prompt_tokens: int) -> bytes:
        """The beginning of a choice, before all of it that follows."""
        ...

    def more(self, choice: int, event: PromptLogprobs | Said | Ended) -> bytes:
        """The next event of a choice, which may be nothing to tell; the last is ``Ended``."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The end of a stream in which every choice has ended."""
        ...

    def error(self, body: ErrorBody) -> bytes:
        """The end of a stream that failed."""
        ...

    def note(self, text: str) -> bytes:
        """What people may want to read meanwhile and programs skip; empty where there is no place for it."""
        ...


class GenerationReply(Response):
    """Runs the generation while it replies, so that all of it ends within a moment when the client leaves."""

    def __init__(self, generation: Generation, dialect: Dialect, *, stream: bool) -> None:
        super().__init__()
        self._generation = generation
        self._dialect = dialect
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replies, as ASGI has it."""
        over = asyncio.Event()
        stream = _Stream(self._generation, self._dialect, send) if self._stream else None

        async def reply() -> None:
            path = scope["path"]
            response = await (self._whole(path) if stream is None else self._streamed(stream, path))
            if response is not None:
                await response(scope, receive, send)
            over.set()

        async with anyio.create_task_group() as tasks:
            # A task of its own is resumed for each token without all the applications around this one.
            tasks.start_soon(reply)
            await asyncio.sleep(0)  # it goes first
            with anyio.move_on_after(_QUICK_SECONDS):
                await over.wait()
            if not over.is_set():
                tasks.start_soon(cancel_when_client_leaves, receive, tasks)
                if stream is not None:
                    tasks.start_soon(stream.keep_alive)
                    tasks.start_soon(stream.tell_place)
                await over.wait()
                tasks.cancel_scope.cancel()

    async def _streamed(self, stream: "_Stream", path: str) -> Response | None:
        """Streams the reply. Returns another one where an error came before anything was sent."""
        error = await self._run(stream)
        if error is not None and stream.abandon():
            return error.response(path, self._generation.headers)
        await stream.close(error)
        return None

    async def _whole(self, path: str) -> Response:
        whole = _Whole(self._dialect)
        error = await self._run(whole)
        return error.response(path, self._generation.headers) if error else self._complete(whole)

    async def _run(self, sink: "_Stream | _Whole") -> ErrorBody | None:
        try:
            await self._generation.run(sink)
        except ServingError as error:
            return error_body(error)
        except Exception:
            log.exception("request %s failed", self._generation.id)
            return INTERNAL_ERROR
        return None

    def _complete(self, whole: "_Whole") -> Response:
        request = self._generation.request
        choices = [whole.choices[choice] for choice in range(request.choices)]
        usages = {index: choice.usage for index, choice in enumerate(choices)}
        body = self._dialect.whole(choices, total_usage(usages, request.n))
        return Response(body, headers=dict(self._generation.headers), media_type="application/json")


@dataclass(slots=True)
class _Whole:
    """Collects a reply that is sent in one piece."""

    dialect: Dialect
    choices: defaultdict[int, ReplyChoice] = field(default_factory=lambda: defaultdict[int, ReplyChoice](ReplyChoice))

    async def loading(self, note: str) -> None:
        """Nothing to tell yet."""

    def serving(self, serving: Serving) -> None:
        self.dialect.serving(serving)

    def event(self, choice: int, event: ChoiceEvent) -> None:
        if not isinstance(event, PrefillProgress):
            self.choices[choice].add(event)

    async def flush(self) -> None:
        """Nothing is sent before the end."""


class _Stream:
    """Writes a stream. Until it is opened, what is written is held back, so that an error can still take its place.

    It opens with the first output after every choice has been accepted; without any, once that has been so for a
    moment, or when the grace is over.
    """

    def __init__(self, generation: Generation, dialect: Dialect, send: Send) -> None:
        self._generation = generation
        self._dialect = dialect
        self._send = send
        self._started = False
        self._starting = anyio.Lock(fast_acquire=True)
        self._open = False
        self._held: list[bytes] = []
        self._note = b""
        self._place_note = b""
        self._waiting = True
        self._speaking = False
        self._quiet = True
        self._accepted: set[int] = set()
        self._all_accepted = asyncio.Event()
        self._usages: dict[int, Usage] = {}

    async def loading(self, note: str) -> None:
        if (comment := self._dialect.note(note)) != self._note:
            self._note = comment
            if self._open:
                await self._write(comment)

    def serving(self, serving: Serving) -> None:
        self._note = b""
        self._dialect.serving(serving)

    def event(self, choice: int, event: ChoiceEvent) -> None:
        if self._waiting and (not isinstance(event, PrefillProgress) or event.processed):
            self._waiting, self._place_note = False, b""
        if choice not in self._accepted:
            self._accepted.add(choice)
            if len(self._accepted) == self._generation.request.choices:
                self._all_accepted.set()
            self._held.append(self._dialect.opening(choice, event.total if isinstance(event, PrefillProgress) else 0))
        if not isinstance(event, PrefillProgress):
            self._speaking = True
            self._held.append(self._dialect.more(choice, event))
            if isinstance(event, Ended):
                self._usages[choice] = event.usage

    async def flush(self) -> None:
        if len(self._usages) == self._generation.request.choices:
            return  # ``close`` comes at once, and sends what is left with its own
        if self._open:
            await self._send_held()
        elif self._speaking and self._all_accepted.is_set():
            await self._start()

    async def keep_alive(self) -> None:
        """Opens the stream when it is accepted, or after the grace, then fills every long silence."""
        await self._generation.routed.wait()  # the headers tell the route
        with anyio.move_on_after(GRACE_SECONDS):
            await self._all_accepted.wait()
        await self._start()
        while True:
            self._quiet = True
            await anyio.sleep(KEEP_ALIVE_SECONDS)
            if self._quiet:
                await self._write(self._dialect.note("keep-alive"))

    async def tell_place(self) -> None:
        """Writes the place in the queue while there is no slot yet."""
        await self._generation.routed.wait()
        number = 0
        while self._waiting:
            number = await self._generation.place.number_after(number)
            if self._waiting:
                self._place_note = self._dialect.note(f"queued {number}") if number else b""
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
        body = b"".join((*self._held, last))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

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
            headers = {"content-type": self._dialect.media_type, **sse.HEADERS, **self._generation.headers}
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
            self._held.insert(0, self._note + self._place_note)
            while any(self._held):
                await self._send_held()
            self._open = True
