"""OpenAI's replies, in one piece and in chunks: the common parts, and chat completions.

Chunks are joined from bytes, because a server may write thousands per second.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.errors import ErrorBody
from exo.api.http.reply import Call, ReplyChoice
from exo.api.openai.timings import Stopwatch
from exo.chat.output.events import Arguments, BrokenCall, Content, Reasoning, ToolCall
from exo.serving.events import (
    ChoiceDelta,
    ChoiceFinished,
    ChoiceStarted,
    Completed,
    GenerationEvent,
    Reason,
    Started,
)
from exo.worker.protocol.events import Logprob, TokenLogprobs, Usage


class Reply(BaseModel):
    """Frozen. A field that OpenAI omits if it is empty is None, and is omitted."""

    model_config = ConfigDict(frozen=True)


class EmbeddingUsage(Reply):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


def absent(value: object) -> bool:
    """For ``Field(exclude_if=absent)``."""
    return value is None


class PromptTokensDetails(Reply):
    """``cached_tokens`` of the prompt were in the cache."""

    cached_tokens: int


class CompletionTokensDetails(Reply):
    """Output tokens that were reasoning, and guesses of a draft that were right or wrong."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(Reply):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int = 0) -> "CompletionUsage":
        """The usage of a request."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=reasoning_tokens,
                accepted_prediction_tokens=usage.accepted_tokens,
                rejected_prediction_tokens=usage.drafted_tokens - usage.accepted_tokens,
            ),
        )


def token_text(logprob: Logprob) -> str:
    r"""A token as text, or as ``bytes:\xe2\x80`` if it is not valid UTF-8 by itself, as OpenAI writes it."""
    raw = bytes(logprob.bytes)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChunkWriter:
    """Writes chunks, which have the same beginning and end throughout a stream."""

    media_type = sse.MEDIA_TYPE
    kind: ClassVar[str]

    def __init__(
        self,
        reply_id: str,
        *,
        include_usage: bool = False,
        logprobs: bool = False,
        token_ids: bool = False,
        timings: bool = False,
    ) -> None:
        self.id = reply_id
        self.created = int(time.time())
        self.model = ""
        self.fingerprint = ""
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._include_usage = include_usage
        self._head = b""
        self._timings = timings
        self._watch = Stopwatch()
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._reasoning_tokens = 0
        # If the usage is requested, all of OpenAI's chunks have the field; only in the last it is not null.
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def start(self, started: Started) -> None:
        """Sets the beginning of all chunks."""
        model = started.capabilities
        # A seed's result depends on these.
        parts = (model.engine, model.engine_version, started.quantization, model.kv_type and f"kv-{model.kv_type}")
        self.model, self.fingerprint = started.model_id, "-".join(filter(None, parts))
        self._watch = Stopwatch()
        common = {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        self._head = b"data: " + to_json(common)[:-1] + b',"choices":['

    def chunk(self, choice: bytes) -> bytes:
        """A chunk with one choice, which is a JSON object without its closing brace."""
        if not self._timings:
            return self._head + choice + self._tail
        usage = self._usage.model_copy(update={"completion_tokens": self._watch.tokens})
        return self._head + choice + self._tail[:-3] + b',"timings":%b}\n\n' % to_json(self._watch.timings(usage))

    def meter(self, event: ChoiceStarted | ChoiceDelta | ChoiceFinished) -> None:
        """Counts the tokens of the reply. In a stream, the cached tokens are only known at the end."""
        match event:
            case ChoiceStarted():
                self._usage = self._usage.model_copy(update={"prompt_tokens": event.prompt_tokens})
            case ChoiceDelta():
                self._watch.took(len(event.tokens))
            case ChoiceFinished():
                self._usage = event.usage
                self._reasoning_tokens += event.reasoning_tokens

    def end(self, usage: Usage) -> bytes:
        """The end of a stream, with the usage if requested."""
        if not self._include_usage:
            return sse.DONE
        told = CompletionUsage.of(usage, self._reasoning_tokens).model_dump_json().encode()
        timings = b',"timings":' + to_json(self._watch.timings(usage)) if self._timings else b""
        return self._head + b'],"usage":' + told + timings + b"}\n\n" + sse.DONE

    def timings(self, choices: Sequence[ReplyChoice], usage: Usage) -> dict[str, int | float] | None:
        """The timings of a whole reply, if requested."""
        self._watch.first = min((choice.began for choice in choices if choice.began), default=0)
        return self._watch.timings(usage) if self._timings else None

    def error(self, body: ErrorBody) -> bytes:
        """An error in the stream, which then has no "[DONE]"."""
        return sse.event(body.openai())

    def note(self, text: str) -> bytes:
        """A comment, which clients skip."""
        return sse.comment(text)


class TopLogprob(Reply):
    """A token that was possible."""

    token: str
    logprob: float | None
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """A generated token."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Reply):
    """The log-probabilities of all tokens of a reply, also of those in reasoning and calls."""

    content: list[ContentLogprob]
    refusal: None = None


class Function(Reply):
    """The called function. ``arguments`` is JSON text."""

    name: str
    arguments: str


class MessageToolCall(Reply):
    """One call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: Function


class AssistantMessage(Reply):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """Null if the message only has calls."""
    reasoning_content: str | None = Field(default=None, exclude_if=absent)
    tool_calls: list[MessageToolCall] | None = Field(default=None, exclude_if=absent)


class ChatChoice(Reply):
    """One of ``n`` replies to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None = Field(default=None, exclude_if=absent)
    finish_reason: Reason
    token_ids: list[int] | None = Field(default=None, exclude_if=absent)


class ChatCompletion(Reply):
    """The reply of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    timings: dict[str, int | float] | None = Field(default=None, exclude_if=absent)


def call_id(reply_id: str, choice: int, index: int) -> str:
    """Nine letters and digits, because Mistral's templates refuse any other length."""
    return hashlib.sha256(f"{reply_id}/{choice}/{index}".encode()).hexdigest()[:9]


def _top(logprob: Logprob) -> TopLogprob:
    return TopLogprob(token=token_text(logprob), logprob=logprob.logprob, bytes=list(logprob.bytes))


def choice_logprobs(items: Sequence[TokenLogprobs]) -> ChoiceLogprobs:
    """The form of the API."""
    return ChoiceLogprobs(
        content=[
            ContentLogprob(**_top(item.chosen).model_dump(), top_logprobs=[_top(each) for each in item.top])
            for item in items
        ]
    )


class ChatDialect(ChunkWriter):
    """``/v1/chat/completions``."""

    kind = "chat.completion.chunk"

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        return (
            ChatCompletion(
                id=self.id,
                created=self.created,
                model=self.model,
                system_fingerprint=self.fingerprint,
                choices=[
                    ChatChoice(
                        index=index,
                        message=self._message(index, choice),
                        logprobs=choice_logprobs(choice.logprobs) if self._logprobs else None,
                        finish_reason=choice.reason,
                        token_ids=choice.tokens if self._token_ids else None,
                    )
                    for index, choice in enumerate(choices)
                ],
                usage=CompletionUsage.of(usage, sum(choice.reasoning_tokens for choice in choices)),
                timings=self.timings(choices, usage),
            )
            .model_dump_json()
            .encode()
        )

    def write(self, event: GenerationEvent) -> bytes:
        if isinstance(event, ChoiceStarted | ChoiceDelta | ChoiceFinished):
            self.meter(event)
        match event:
            case ChoiceDelta():
                return self._delta_chunks(event)
            case ChoiceFinished():
                return self._last_chunks(event)
            case ChoiceStarted(choice):
                first = b'{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null'
                return self.chunk(first % choice)
            case Started():
                self.start(event)
                return b""
            case Completed(usage):
                return self.end(usage)
            case _:
                return b""

    def _delta_chunks(self, event: ChoiceDelta) -> bytes:
        deltas = self._deltas(event)
        extra = self._extra(event)
        if extra and not deltas:
            deltas = [b'{"content":""}']
        data = b""
        for delta in deltas:
            data += self.chunk(b'{"index":%d,"delta":%b%b,"finish_reason":null' % (event.choice, delta, extra))
            extra = b""  # the tokens belong to the first chunk
        return data

    def _last_chunks(self, event: ChoiceFinished) -> bytes:
        chunks = [
            self.chunk(b'{"index":%d,"delta":%b,"finish_reason":null' % (event.choice, delta))
            for delta in self._deltas(event)
        ]
        last = self.chunk(b'{"index":%d,"delta":{},"finish_reason":"%b"' % (event.choice, event.reason.encode()))
        return b"".join(chunks) + last

    def _deltas(self, event: ChoiceDelta | ChoiceFinished) -> list[bytes]:
        """A broken call has no form of its own: its arguments end early, and the finish reason is not its call."""
        return [self._delta(event.choice, part) for part in event.parts if not isinstance(part, BrokenCall)]

    def _extra(self, event: ChoiceDelta) -> bytes:
        extra = b""
        if self._logprobs and event.logprobs:
            extra += b',"logprobs":' + choice_logprobs(event.logprobs).model_dump_json().encode()
        if self._token_ids:
            extra += b',"token_ids":' + to_json(event.tokens)
        return extra

    def _delta(self, choice: int, part: Content | Reasoning | ToolCall | Arguments) -> bytes:
        match part:
            case Content(text):
                return b'{"content":%b}' % to_json(text)
            case Reasoning(text):
                return b'{"reasoning_content":%b}' % to_json(text)
            case ToolCall(index, name):
                call = {
                    "index": index,
                    "id": call_id(self.id, choice, index),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
                return to_json({"tool_calls": [call]})
            case Arguments(index, text):
                return to_json({"tool_calls": [{"index": index, "function": {"arguments": text}}]})

    def _message(self, index: int, choice: ReplyChoice) -> AssistantMessage:
        return AssistantMessage(
            content=choice.content if choice.content or not choice.calls else None,
            reasoning_content=choice.reasoning or None,
            tool_calls=[self._call(index, at, call) for at, call in enumerate(choice.calls)] or None,
        )

    def _call(self, choice: int, index: int, call: Call) -> MessageToolCall:
        function = Function(name=call.name, arguments=call.arguments)
        return MessageToolCall(id=call_id(self.id, choice, index), function=function)
