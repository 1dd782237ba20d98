"""Anthropic's messages: the reply, in one piece and in events, which are joined from bytes for speed."""

from collections.abc import Sequence
from typing import Literal, final

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic_core import from_json, to_json

from exo.api.http import sse
from exo.api.http.errors import ErrorBody
from exo.api.http.reply import ReplyChoice
from exo.api.openai.response import absent, call_id
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, ChoiceStarted, Completed, GenerationEvent, Reason, Started
from exo.worker.protocol.events import Usage

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class AnthropicReply(BaseModel):
    """Frozen; the names are Anthropic's."""

    model_config = ConfigDict(frozen=True)


class ThinkingTokens(AnthropicReply):
    """The number of output tokens that were reasoning."""

    thinking_tokens: int


class AnthropicUsage(AnthropicReply):
    """Tokens. ``input_tokens`` are the prompt tokens that were computed; the others were in the cache.

    Computed tokens are cached, too, but ``cache_creation_input_tokens`` does not count them again.
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens | None = Field(default=None, exclude_if=absent)


class AnthropicText(AnthropicReply):
    """Text."""

    type: Literal["text"] = "text"
    text: str


class AnthropicThinking(AnthropicReply):
    """Reasoning. It has no signature, because later requests need not prove theirs."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class AnthropicToolUse(AnthropicReply):
    """A call."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, JsonValue]


class AnthropicReplyMessage(AnthropicReply):
    """The reply of ``/v1/messages``."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnthropicText | AnthropicThinking | AnthropicToolUse]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(AnthropicReply):
    """The reply of ``/v1/messages/count_tokens``."""

    input_tokens: int


def _usage(usage: Usage, reasoning_tokens: int) -> AnthropicUsage:
    return AnthropicUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=ThinkingTokens(thinking_tokens=reasoning_tokens) if reasoning_tokens else None,
    )


def _event(kind: bytes, fields: bytes) -> bytes:
    """An event whose data repeats its name. ``fields`` are those of a JSON object, each after a comma."""
    return b"event: %b\n" % kind + sse.event(b'{"type":"%b"%b}' % (kind, fields))


_BROKEN_CALL = ErrorBody(
    status=500, message="the model wrote a tool call that cannot be read; it must not be run", code="broken_tool_call"
)


@final
class MessagesDialect:
    """``/v1/messages``. ``max_tokens`` as the request has it; ``thinking`` is whether reasoning is told.

    A call that is not whole must not look like one, since clients run what looks like one. A whole reply leaves it
    out. In a stream, its block does not stop. Clients that complete its input on their own need the stop reason of a
    reply that was cut off, or else an error at the end.
    """

    media_type = sse.MEDIA_TYPE

    def __init__(self, reply_id: str, *, max_tokens: int | None, thinking: bool = True) -> None:
        self._id = reply_id
        self._max_tokens = max_tokens
        self._thinking = thinking
        self._model = ""
        self._block: type[Content] | type[Reasoning] | int | None = None
        """The open content block: text, reasoning, or the call with this index."""
        self._blocks = 0
        """The number of blocks before it."""
        self._broken = False

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        (choice,) = choices
        content: list[AnthropicText | AnthropicThinking | AnthropicToolUse] = []
        if choice.reasoning and self._thinking:
            content.append(AnthropicThinking(thinking=choice.reasoning))
        if choice.content:
            content.append(AnthropicText(text=choice.content))
        for index, call in enumerate(choice.calls):
            if call.whole:
                arguments = from_json(call.arguments)
                content.append(AnthropicToolUse(id=self._call_id(index), name=call.name, input=arguments))
        message = AnthropicReplyMessage(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=self._reason(choice.reason, choice.stop, usage),
            stop_sequence=choice.stop,
            usage=_usage(usage, choice.reasoning_tokens),
        )
        return message.model_dump_json().encode()

    def write(self, event: GenerationEvent) -> bytes:
        match event:
            case ChoiceDelta():
                return b"".join([self._part(part) for part in event.parts])
            case ChoiceFinished():
                return self._finish(event)
            case ChoiceStarted():
                return self._message_start(event.prompt_tokens)
            case Started():
                self._model = event.model_id
                return b""
            case Completed():
                return b"" if self._broken else _event(b"message_stop", b"")
            case _:
                return b""

    def _message_start(self, prompt_tokens: int) -> bytes:
        """The number of cached tokens, and so the usage, is only known at the end."""
        message = AnthropicReplyMessage(
            id=self._id,
            model=self._model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=AnthropicUsage(input_tokens=prompt_tokens, cache_read_input_tokens=0, output_tokens=0),
        )
        return _event(b"message_start", b',"message":' + message.model_dump_json().encode())

    def _finish(self, event: ChoiceFinished) -> bytes:
        data = b"".join([self._part(part) for part in event.parts])
        if self._broken:
            return data + self._close() + self.error(_BROKEN_CALL)
        reason = self._reason(event.reason, event.stop, event.usage)
        usage = _usage(event.usage, event.reasoning_tokens).model_dump_json().encode()
        delta = to_json({"stop_reason": reason, "stop_sequence": event.stop})
        return data + self._close() + _event(b"message_delta", b',"delta":' + delta + b',"usage":' + usage)

    def error(self, body: ErrorBody) -> bytes:
        return b"event: error\n" + sse.event(body.anthropic())

    def note(self, text: str) -> bytes:
        """A ping, which programs skip, and a comment for people."""
        return sse.comment(text)[:-1] + _event(b"ping", b"")

    def _part(self, part: Part) -> bytes:
        match part:
            case Content(text):
                return self._open(Content, b'{"type":"text","text":""}') + self._delta("text_delta", "text", text)
            case Reasoning(text):
                if not self._thinking:
                    return b""
                block = b'{"type":"thinking","thinking":"","signature":""}'
                return self._open(Reasoning, block) + self._delta("thinking_delta", "thinking", text)
            case ToolCall(index, name):
                call = AnthropicToolUse(id=self._call_id(index), name=name, input={})
                return self._open(index, call.model_dump_json().encode())
            case Arguments(_, text):
                return self._delta("input_json_delta", "partial_json", text)
            case BrokenCall(_, cut_off):
                self._block = None
                self._blocks += 1
                self._broken = self._broken or not cut_off
                return b""

    def _open(self, block: type[Content] | type[Reasoning] | int, begun: bytes) -> bytes:
        """Opens a block, unless it is the one that is open."""
        if block == self._block:
            return b""
        data = self._close()
        self._block = block
        return data + _event(b"content_block_start", b',"index":%d,"content_block":%b' % (self._blocks, begun))

    def _close(self) -> bytes:
        if self._block is None:
            return b""
        data = _event(b"content_block_stop", b',"index":%d' % self._blocks)
        self._block = None
        self._blocks += 1
        return data

    def _delta(self, kind: str, name: str, text: str) -> bytes:
        delta = to_json({"type": kind, name: text})
        return _event(b"content_block_delta", b',"index":%d,"delta":%b' % (self._blocks, delta))

    def _call_id(self, index: int) -> str:
        return f"toolu_{call_id(self._id, 0, index)}"

    def _reason(self, reason: Reason, stop: str | None, usage: Usage) -> StopReason:
        if stop is not None:
            return "stop_sequence"
        if reason == "length":
            full = self._max_tokens is None or usage.completion_tokens < self._max_tokens
            return "model_context_window_exceeded" if full else "max_tokens"
        return "tool_use" if reason == "tool_calls" else "end_turn"
