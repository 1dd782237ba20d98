"""Reads replies: when text came, how many tokens, and what went wrong."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, final

from httptools import HttpParserError, HttpResponseParser
from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import to_json

from exo.bench.client import Exchange

_EXAMPLE = 300
"""The most characters of an error message."""


class _Details(BaseModel):
    cached_tokens: int | None = None


class TokenUsage(BaseModel):
    """The token counts that the server states."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _ChunkDelta(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: JsonValue = None


class _ChunkChoice(BaseModel):
    text: str | None = None
    delta: _ChunkDelta | None = None
    token_ids: list[int] | None = None

    @property
    def says(self) -> bool:
        """Whether it has text, tokens or tool calls, and not only the role or the end."""
        if self.text or self.token_ids:
            return True
        of = self.delta
        return of is not None and bool(of.content or of.reasoning_content or of.reasoning or of.tool_calls)


class _StreamChunk(BaseModel):
    """The fields of an event that are read. Servers add others."""

    choices: list[_ChunkChoice] = []
    usage: TokenUsage | None = None
    error: JsonValue = None


CountedBy = Literal["usage", "chunks"]


@dataclass(frozen=True, slots=True)
class Fault:
    """An error of a request: its kind, by which errors are counted, and its message."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one request. Times are seconds by ``time.perf_counter``, ``times`` those of chunks with text."""

    began: float
    ended: float
    times: tuple[float, ...]
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    completion_tokens: int = 0
    counted_by: CountedBy = "chunks"
    ids: int | None = None
    """The number of token ids in the stream; None if it had none."""
    fault: Fault | None = None
    cut: bool = False

    @property
    def whole(self) -> bool:
        """Whether the reply is complete and correct."""
        return self.fault is None and not self.cut

    @property
    def ttft(self) -> float:
        """Seconds to the first text, of which there must be some."""
        return self.times[0] - self.began

    @property
    def e2e(self) -> float:
        """Seconds to the end of the reply."""
        return self.ended - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds from each chunk with text to the next."""
        return [later - earlier for earlier, later in pairwise(self.times)]

    @property
    def itl(self) -> float | None:
        """Mean seconds per token after the first; None for a single token."""
        return (self.times[-1] - self.times[0]) / (self.completion_tokens - 1) if self.completion_tokens > 1 else None


def read(exchange: Exchange) -> Outcome:
    """The outcome of an exchange that has ended."""
    reply = StreamedReply()
    try:
        for moment, data in exchange.pieces:
            reply.feed(moment, data)
    except (HttpParserError, ValidationError) as error:
        reply.fault = reply.fault or Fault("unreadable", " ".join(str(error).split())[:_EXAMPLE])
    usage = reply.usage
    return Outcome(
        began=exchange.began,
        ended=exchange.ended,
        times=tuple(reply.times),
        prompt_tokens=usage.prompt_tokens if usage else 0,
        cached_tokens=usage.prompt_tokens_details.cached_tokens if usage and usage.prompt_tokens_details else None,
        completion_tokens=usage.completion_tokens if usage else len(reply.ids or reply.times),
        counted_by="usage" if usage else "chunks",
        ids=None if reply.ids is None else len(reply.ids),
        fault=_fault(exchange, reply),
        cut=exchange.cut,
    )


def _fault(exchange: Exchange, reply: "StreamedReply") -> Fault | None:
    """The first error, from the connection up to the number of tokens."""
    if exchange.cut:
        return None
    if exchange.failure:
        return Fault("connection", exchange.failure)
    if reply.status is None:
        return reply.fault or Fault("connection", "the server hung up without a reply")
    if reply.status != 200:
        return Fault(f"http_{reply.status}", _refusal(reply.plain))
    if reply.fault is not None:
        return reply.fault
    if not reply.done:
        return Fault("incomplete", "the stream ended without [DONE]")
    if not reply.times:
        return Fault("no_text", "the stream had no text")
    return _miscount(reply)


def _refusal(body: bytes) -> str:
    """The error message of a reply that is no stream, in OpenAI's form or any other."""
    try:
        error = _StreamChunk.model_validate_json(body).error
    except ValidationError:
        error = None
    return _message(error) if error is not None else body.decode(errors="replace")[:_EXAMPLE]


def _message(error: JsonValue) -> str:
    said = error.get("message") if isinstance(error, dict) else error
    return (said if isinstance(said, str) else to_json(error).decode())[:_EXAMPLE]


def _miscount(reply: "StreamedReply") -> Fault | None:
    """Compares the usage with the stream. A chunk has at least one token."""
    if reply.usage is None:
        return None
    counted, chunks = reply.usage.completion_tokens, len(reply.times)
    if reply.ids is not None and len(reply.ids) != counted:
        return Fault("token_count", f"the usage has {counted} tokens, the stream {len(reply.ids)} ids")
    if chunks > counted:
        return Fault("token_count", f"the usage has {counted} tokens, the stream {chunks} chunks of text")
    return None


@final
@dataclass(slots=True)
class StreamedReply:
    """A reply as far as it has been read. ``feed`` raises HttpParserError and ValidationError."""

    times: list[float] = field(default_factory=list[float])
    """When chunks with text came, in seconds."""
    status: int | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    """With lower-case names."""
    plain: bytes = b""
    """The body of a reply that is an error."""
    text: str = ""
    ids: list[int] | None = None
    """The token ids; None if the server sends none."""
    usage: TokenUsage | None = None
    done: bool = False
    fault: Fault | None = None
    _parser: HttpResponseParser = field(init=False)
    _rest: bytes = b""
    _bodies: list[bytes] = field(default_factory=list[bytes])

    def __post_init__(self) -> None:
        self._parser = HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._bodies.append(body)

    def feed(self, moment: float, data: bytes) -> None:
        """Takes one read."""
        self._parser.feed_data(data)
        body, self._bodies = b"".join(self._bodies), []
        if self.status != 200:
            self.plain += body
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:  # an event of OpenAI's API has one line
            if line.startswith(b"data:"):
                self._take(moment, line[5:].strip())

    def _take(self, moment: float, event: bytes) -> None:
        if event == b"[DONE]":
            self.done = True
            return
        chunk = _StreamChunk.model_validate_json(event)
        if chunk.error is not None:
            self.fault = self.fault or Fault("stream_error", _message(chunk.error))
        if any(choice.says for choice in chunk.choices):
            self.times.append(moment)
        for choice in chunk.choices:
            self.text += choice.text or ""
            if choice.token_ids is not None:
                self.ids = self.ids or []
                self.ids += choice.token_ids
        self.usage = chunk.usage or self.usage
