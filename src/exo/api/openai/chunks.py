"""Common parts of OpenAI's replies. Chunks are joined from bytes, because a server may write thousands per second."""

import time
from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from exo.api.http import sse
from exo.api.http.errors import ErrorBody
from exo.serving.events import Started
from exo.worker.protocol.messages import Logprob, Usage


class Reply(BaseModel):
    """Frozen. A field that OpenAI omits if it is empty is None, and is omitted."""

    model_config = ConfigDict(frozen=True)


def absent(value: object) -> bool:
    """For ``Field(exclude_if=absent)``."""
    return value is None


class PromptTokensDetails(Reply):
    """``cached_tokens`` of the prompt were in the cache."""

    cached_tokens: int


class CompletionUsage(Reply):
    """Tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> "CompletionUsage":
        """The usage of a request."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        )


class ListedModel(Reply):
    """One available model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(Reply):
    """The reply of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ListedModel]


def token_text(logprob: Logprob) -> str:
    r"""A token as text, or as ``bytes:\xe2\x80`` if it is not valid UTF-8 by itself, as OpenAI writes it."""
    raw = bytes(logprob.bytes)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChunkWriter:
    """The parts of a chunk that stay the same through a stream."""

    media_type = sse.MEDIA_TYPE

    def __init__(self, reply_id: str, kind: str, *, include_usage: bool) -> None:
        self.id = reply_id
        self.created = int(time.time())
        self.model = ""
        self.fingerprint = ""
        self._kind = kind
        self._include_usage = include_usage
        self._head = b""
        # If the usage is requested, all of OpenAI's chunks have the field; only in the last it is not null.
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def start(self, started: Started) -> None:
        """Sets the beginning of all chunks."""
        self.model, self.fingerprint = started.model_id, started.fingerprint
        common = {
            "id": self.id,
            "object": self._kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        self._head = b"data: " + to_json(common)[:-1] + b',"choices":['

    def chunk(self, choice: bytes) -> bytes:
        """A chunk with one choice, given as a JSON object without its closing brace."""
        return self._head + choice + self._tail

    def end(self, usage: Usage) -> bytes:
        """The end of a stream, with the usage if requested."""
        if not self._include_usage:
            return sse.DONE
        return self._head + b'],"usage":' + CompletionUsage.of(usage).model_dump_json().encode() + b"}\n\n" + sse.DONE

    def error(self, body: ErrorBody) -> bytes:
        """An error in the stream, which then has no "[DONE]"."""
        return sse.event(body.openai())

    def note(self, text: str) -> bytes:
        """A comment, which clients skip."""
        return sse.comment(text)
