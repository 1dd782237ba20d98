"""OpenAI's replies. Chunks of a stream are put together as bytes: there may be thousands of them in a second."""

import time
from collections.abc import Sequence
from typing import Literal, final

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from exo.api import sse
from exo.api.errors import ErrorBody
from exo.api.reply import Choice
from exo.worker.messages import FinishReason, Usage


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True)


class PromptTokensDetails(_Reply):
    """``cached_tokens`` of the prompt were not computed again."""

    cached_tokens: int


class CompletionUsage(_Reply):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AssistantMessage(_Reply):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(_Reply):
    """One of ``n`` replies to a conversation."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Reply):
    """The reply of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class TextChoice(_Reply):
    """One of ``n`` continuations of one of the prompts."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]


class Completion(_Reply):
    """The reply of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: CompletionUsage


class Model(_Reply):
    """One model that may be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(_Reply):
    """The reply of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


def _usage(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def _reason(reason: FinishReason) -> Literal["stop", "length"]:
    assert reason != "cancelled"
    return reason


class _Chunks:
    """The parts of a chunk that stay the same through a stream."""

    def __init__(self, reply_id: str, kind: str, *, include_usage: bool) -> None:
        self.id = reply_id
        self.created = int(time.time())
        self.model = ""
        self.fingerprint = ""
        self._kind = kind
        self._include_usage = include_usage
        self._head = b""
        # With the usage asked for, OpenAI's chunks all have the field, null but in the last.
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def serving(self, model_id: str, fingerprint: str) -> None:
        self.model, self.fingerprint = model_id, fingerprint
        common = {
            "id": self.id,
            "object": self._kind,
            "created": self.created,
            "model": model_id,
            "system_fingerprint": fingerprint,
        }
        self._head = b"data: " + to_json(common)[:-1] + b',"choices":['

    def chunk(self, choice: bytes) -> bytes:
        """A chunk with one choice, given as a JSON object without its closing brace."""
        return self._head + choice + self._tail

    def end(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return sse.DONE
        return self._head + b'],"usage":' + _usage(usage).model_dump_json().encode() + b"}\n\n" + sse.DONE

    def error(self, body: ErrorBody) -> bytes:
        return sse.event(body.envelope())


@final
class ChatDialect(_Chunks):
    """``/v1/chat/completions``."""

    def __init__(self, reply_id: str, *, include_usage: bool = False) -> None:
        super().__init__(reply_id, "chat.completion.chunk", include_usage=include_usage)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return (
            ChatCompletion(
                id=self.id,
                created=self.created,
                model=self.model,
                system_fingerprint=self.fingerprint,
                choices=[
                    ChatChoice(
                        index=index,
                        message=AssistantMessage(content=choice.text),
                        finish_reason=_reason(choice.reason),
                    )
                    for index, choice in enumerate(choices)
                ],
                usage=_usage(usage),
            )
            .model_dump_json()
            .encode()
        )

    def opening(self, choice: int) -> bytes:
        return self.chunk(b'{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null' % choice)

    def text(self, choice: int, text: str) -> bytes:
        return self.chunk(b'{"index":%d,"delta":{"content":%b},"finish_reason":null' % (choice, to_json(text)))

    def finish(self, choice: int, reason: FinishReason) -> bytes:
        return self.chunk(b'{"index":%d,"delta":{},"finish_reason":"%b"' % (choice, _reason(reason).encode()))


@final
class CompletionDialect(_Chunks):
    """``/v1/completions``."""

    def __init__(self, reply_id: str, *, include_usage: bool = False) -> None:
        super().__init__(reply_id, "text_completion", include_usage=include_usage)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return (
            Completion(
                id=self.id,
                created=self.created,
                model=self.model,
                system_fingerprint=self.fingerprint,
                choices=[
                    TextChoice(index=index, text=choice.text, finish_reason=_reason(choice.reason))
                    for index, choice in enumerate(choices)
                ],
                usage=_usage(usage),
            )
            .model_dump_json()
            .encode()
        )

    def opening(self, choice: int) -> bytes:
        """Nothing: a text completion has no role."""
        return b""

    def text(self, choice: int, text: str) -> bytes:
        return self.chunk(b'{"index":%d,"text":%b,"finish_reason":null' % (choice, to_json(text)))

    def finish(self, choice: int, reason: FinishReason) -> bytes:
        return self.chunk(b'{"index":%d,"text":"","finish_reason":"%b"' % (choice, _reason(reason).encode()))
