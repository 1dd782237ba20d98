"""Ollama's chats and completions: the reply, in one piece and in lines of JSON."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic_core import from_json

from exo.api.http.errors import ErrorBody
from exo.api.http.reply import Call, ReplyChoice
from exo.api.openai.response import absent, call_id, token_text
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.serving.events import ChoiceDelta, ChoiceFinished, Completed, GenerationEvent, Reason, Started
from exo.worker.protocol.events import Logprob, TokenLogprobs, Usage

DoneReason = Literal["stop", "length", "load", "unload"]


def now() -> str:
    """The time in Ollama's format."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class OllamaReply(BaseModel):
    """Frozen; the names are Ollama's. Durations are in nanoseconds."""

    model_config = ConfigDict(frozen=True)


class OllamaTokenLogprob(OllamaReply):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float | None
    bytes: list[int]


class OllamaLogprob(OllamaTokenLogprob):
    """A generated token and the most probable alternatives."""

    top_logprobs: list[OllamaTokenLogprob] | None = Field(default=None, exclude_if=absent)


class OllamaReplyMessage(OllamaReply):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    thinking: str | None = Field(default=None, exclude_if=absent)
    tool_calls: list[dict[str, JsonValue]] | None = Field(default=None, exclude_if=absent)


class _Head(OllamaReply):
    model: str
    created_at: str


class _ChatHead(_Head):
    message: OllamaReplyMessage


class _GenerateHead(_Head):
    response: str
    thinking: str | None = Field(default=None, exclude_if=absent)


class _FinalReply(OllamaReply):
    """In a stream, only the last line has values."""

    done: bool = False
    done_reason: DoneReason | None = Field(default=None, exclude_if=absent)
    total_duration: int | None = Field(default=None, exclude_if=absent)
    load_duration: int | None = Field(default=None, exclude_if=absent)
    prompt_eval_count: int | None = Field(default=None, exclude_if=absent)
    prompt_eval_duration: int | None = Field(default=None, exclude_if=absent)
    eval_count: int | None = Field(default=None, exclude_if=absent)
    eval_duration: int | None = Field(default=None, exclude_if=absent)
    logprobs: list[OllamaLogprob] | None = Field(default=None, exclude_if=absent)


# Fields come in the order of the bases, from right to left.
class OllamaChatResponse(_FinalReply, _ChatHead):
    """The reply of ``/api/chat``, or a line of it."""


class OllamaGenerateResponse(_FinalReply, _GenerateHead):
    """The reply of ``/api/generate``, or a line of it."""


def loaded(
    model: str, *, chat: bool, reason: Literal["load", "unload"] = "load"
) -> OllamaChatResponse | OllamaGenerateResponse:
    """The reply to a request that only loads a model, or unloads it."""
    if chat:
        message = OllamaReplyMessage(content="")
        return OllamaChatResponse(model=model, created_at=now(), message=message, done=True, done_reason=reason)
    return OllamaGenerateResponse(model=model, created_at=now(), response="", done=True, done_reason=reason)


def _token(logprob: Logprob) -> OllamaTokenLogprob:
    return OllamaTokenLogprob(token=token_text(logprob), logprob=logprob.logprob, bytes=list(logprob.bytes))


def _logprobs(items: Sequence[TokenLogprobs]) -> list[OllamaLogprob]:
    return [
        OllamaLogprob(**_token(item.chosen).model_dump(), top_logprobs=[_token(each) for each in item.top] or None)
        for item in items
    ]


def _line(document: bytes) -> bytes:
    """A JSON document as one line. Characters such as U+2028, which end a line for some clients, are escaped."""
    for character in "\u0085\u2028\u2029":
        document = document.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return document + b"\n"


@final
class OllamaDialect:
    """``/api/chat`` or ``/api/generate``.

    A call is told when it is whole, for its arguments are an object here. One that is not whole is not told at all:
    clients run what they are told to call, whatever the reason for the end.
    """

    media_type = "application/x-ndjson"

    def __init__(self, reply_id: str, *, chat: bool, logprobs: bool = False) -> None:
        self._id = reply_id
        self._chat = chat
        self._logprobs = logprobs
        self._model = ""
        self._arrived = self._loaded = time.monotonic_ns()
        self._began = 0
        self._calls = 0
        self._call: Call | None = None
        """The call whose arguments are incomplete."""
        self._reason: DoneReason = "stop"

    def whole(self, choices: Sequence[ReplyChoice], usage: Usage) -> bytes:
        (choice,) = choices
        self._began = choice.began
        self._ends(choice.reason)
        calls = [self._told(call) for call in choice.calls if call.whole]
        logprobs = _logprobs(choice.logprobs) if self._logprobs else None
        return self._piece(choice.content, choice.reasoning, calls, self._outcome(usage, logprobs))

    def write(self, event: GenerationEvent) -> bytes:
        match event:
            case ChoiceDelta():
                self._began = self._began or time.monotonic_ns()
                return b"".join(self._lines(event.parts, event.logprobs if self._logprobs else ()))
            case ChoiceFinished():
                self._ends(event.reason)
                return b"".join([*self._lines(event.parts, ()), *self._finished_call()])
            case Started():
                self._model = event.model_id
                self._loaded = time.monotonic_ns()
                return b""
            case Completed(usage):
                return _line(self._piece("", "", [], self._outcome(usage, None)))
            case _:
                return b""

    def _lines(self, parts: Sequence[Part], tokens: Sequence[TokenLogprobs]) -> list[bytes]:
        """The log-probabilities belong to the first line."""
        logprobs = _logprobs(tokens) if tokens else None
        lines: list[bytes] = []
        for part in parts:
            match part:
                case Content(text):
                    lines += [*self._finished_call(), _line(self._piece(text, "", [], {"logprobs": logprobs}))]
                    logprobs = None
                case Reasoning(text):
                    lines += [*self._finished_call(), _line(self._piece("", text, [], {"logprobs": logprobs}))]
                    logprobs = None
                case ToolCall(_, name):
                    lines += self._finished_call()
                    self._call = Call(name)
                case Arguments(_, text):
                    assert self._call is not None
                    self._call.arguments += text
                case BrokenCall():
                    self._call = None
        if logprobs:
            lines.append(_line(self._piece("", "", [], {"logprobs": logprobs})))
        return lines

    def error(self, body: ErrorBody) -> bytes:
        return _line(body.ollama())

    def note(self, text: str) -> bytes:
        """Empty: lines of JSON have no comments."""
        return b""

    def _finished_call(self) -> list[bytes]:
        call, self._call = self._call, None
        if call is None:
            return []
        return [_line(self._piece("", "", [self._told(call)], {}))]

    def _told(self, call: Call) -> dict[str, JsonValue]:
        function: dict[str, JsonValue] = {
            "index": self._calls,
            "name": call.name,
            "arguments": from_json(call.arguments),
        }
        told: dict[str, JsonValue] = {"id": f"call_{call_id(self._id, 0, self._calls)}", "function": function}
        self._calls += 1
        return told

    def _ends(self, reason: Reason) -> None:
        self._reason = "length" if reason == "length" else "stop"

    def _outcome(self, usage: Usage, logprobs: list[OllamaLogprob] | None) -> dict[str, Any]:
        ended = time.monotonic_ns()
        began = self._began or ended
        return {
            "done": True,
            "done_reason": self._reason,
            "total_duration": ended - self._arrived,
            "load_duration": self._loaded - self._arrived,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": began - self._loaded,
            "eval_count": usage.completion_tokens,
            "eval_duration": ended - began,
            "logprobs": logprobs,
        }

    def _piece(self, content: str, thinking: str, calls: list[dict[str, JsonValue]], outcome: dict[str, Any]) -> bytes:
        head: dict[str, Any] = {"model": self._model, "created_at": now(), **outcome}
        if self._chat:
            message = OllamaReplyMessage(content=content, thinking=thinking or None, tool_calls=calls or None)
            return OllamaChatResponse(**head, message=message).model_dump_json().encode()
        return OllamaGenerateResponse(**head, response=content, thinking=thinking or None).model_dump_json().encode()
