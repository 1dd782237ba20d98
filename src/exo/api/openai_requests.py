"""OpenAI's requests: the fields that are honoured, and those that are refused by name.

Numbers are numbers and flags are flags: nothing is read out of strings, and 1.0 is no integer. An explicit null means
the default.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 1024
"""Sequences that one request may ask for: prompts times ``n``."""
MAX_ENTRIES = 1024
"""Of ``logit_bias`` and of ``metadata``."""

_ANY_TURN = ("none", "auto")

UNSUPPORTED: Mapping[str, tuple[JsonValue, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "function_call": _ANY_TURN,
    "functions": ([],),
    "grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": _ANY_TURN,
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields known elsewhere that nothing here can honour yet, with the values that ask for nothing, besides null."""


def _invalid(reason: str, param: str = "") -> PydanticCustomError:
    """``param`` is relative to the field at which the error is raised."""
    return PydanticCustomError("invalid_value", "{reason}", {"reason": reason, "param": param})


def _unsupported(reason: str, param: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", "{reason}", {"reason": reason, "param": param})


def _unknown(name: str, known: Iterable[str]) -> PydanticCustomError:
    near = difflib.get_close_matches(name[:64], known)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return PydanticCustomError(
        "unknown_parameter", "{reason}", {"reason": f"there is no such field{hint}", "param": name[:64]}
    )


def _same(left: JsonValue, right: JsonValue) -> bool:
    """Equality that keeps 0 from False and 1 from True."""
    return type(left) is type(right) and left == right


class RequestBody(BaseModel):
    """What all request bodies have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        kept: dict[str, JsonValue] = {}
        for name, value in cast(dict[str, JsonValue], data).items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name not in cls.unsupported:
                raise _unknown(name, cls.model_fields)
            elif value is not None and not any(_same(value, neutral) for neutral in cls.unsupported[name]):
                raise _unsupported("not supported by any runner of this server", name)
        return kept


def _text_of(content: JsonValue) -> JsonValue:
    """Content given in parts as one string, a line each."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise _unsupported(f"{kind!r} is not supported; accepted is 'text'", f"{at}.type")
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and isinstance(part["text"], str)):
            raise _invalid('must be {"type": "text", "text": "…"}', str(at))
        texts.append(part["text"])
    if not texts:
        raise _invalid("at least one content part is needed")
    return "\n".join(texts)


Content = Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | list[dict[str, str]])]


class ChatMessage(RequestBody):
    """One message. What an earlier reply's message holds besides its content is accepted where it is empty."""

    unsupported = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "reasoning_content": ("",),
        "refusal": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = Field(default=None, max_length=256)
    tool_call_id: str | None = Field(default=None, max_length=256)


def _few(value: JsonValue) -> JsonValue:
    """Bounds a table before its entries are looked at, each of which may be a fault of its own."""
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise _invalid(f"at most {MAX_ENTRIES} entries are accepted (got {len(value)})")
    return value


TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


def _stops(value: JsonValue) -> JsonValue:
    return [value] if isinstance(value, str) else value


class StreamOptions(RequestBody):
    """What a stream holds besides its text."""

    unsupported = {"include_obfuscation": (False,)}

    include_usage: bool = Field(default=False, description="End the stream with a chunk that holds the usage.")


class GenerationFields(RequestBody):
    """What both endpoints accept. Where a request says nothing, the model card decides, then the default."""

    unsupported = UNSUPPORTED

    model: str = Field(min_length=1, max_length=300, description="A model id or alias, optionally with @runner.")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 always takes the most probable token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Keep the most probable tokens up to this sum.")
    top_k: int = Field(default=0, ge=0, le=1 << 31, description="Keep this many tokens; 0 keeps all.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Drop tokens below this share of the largest.")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, description="1 is none.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenIdText, Bias], BeforeValidator(_few)] = Field(
        default={}, description="Added to the logits of these token ids."
    )
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64, description="Same seed, same tokens.")
    stop: Annotated[list[StopText], BeforeValidator(_stops, json_schema_input_type=str | list[str])] = Field(
        default=[], max_length=16, description="A string or up to 16 strings that end the reply."
    )
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 31, description="Null: until the context is full.")
    ignore_eos: bool = Field(default=False, description="Go on after an end-of-generation token.")
    n: int = Field(default=1, ge=1, le=16, description="Choices for each prompt.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512, description="Has no effect.")
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] = Field(default={}, description="Has no effect.")
    prompt_cache_key: str | None = Field(default=None, max_length=512, description="Has no effect.")
    safety_identifier: str | None = Field(default=None, max_length=512, description="Has no effect.")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise _invalid("only allowed where stream is true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(GenerationFields):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 31, description="Newer name of max_tokens.")

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _invalid("differs from max_tokens; give one of the two", "max_completion_tokens")
        return self


def _prompts(value: JsonValue) -> JsonValue:
    """Every accepted form as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _invalid("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")
    return [value] if isinstance(value[0], int) else value


def _prompt(value: JsonValue) -> JsonValue:
    """Refused here, since a union would explain what is wrong with each of its types."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_token_id, value))):
        return value
    raise _invalid("each prompt must be a string or a list of token ids, not empty")


def _is_token_id(value: JsonValue) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


Prompt = Annotated[str | list[int], BeforeValidator(_prompt)]


class CompletionRequest(GenerationFields):
    """The body of ``POST /v1/completions``. A prompt is tokenized as it is: special tokens in its text are special."""

    prompt: Annotated[
        list[Prompt], BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ] = Field(max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _not_too_many(self) -> "CompletionRequest":
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise _invalid(f"the number of prompts times n must not exceed {MAX_CHOICES}", "n")
        return self
