"""Ollama's requests: supported fields, fields without effect, and fields that are refused."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_json

from exo.api.http.body import RequestBody, Unsupported, honoured, invalid, missing
from exo.api.http.picture_parts import bare_picture
from exo.api.ollama.options import EmbedOptions, OllamaOptions
from exo.api.openai.chat_request import MaxReasoningTokens
from exo.api.openai.common_request import MAX_INPUTS
from exo.api.openai.tools import MAX_TOOLS, ToolDefinition, ToolName, check_tool_names
from exo.chat.template.reshaping import short_id
from exo.serving.pictures.limits import MOST_PICTURES
from exo.serving.request import Conversation, GenerationRequest, Infill, OutputConstraint, Prompt
from exo.worker.protocol.messages import MAX_LOGPROBS

LATEST = ":latest"
"""Ollama's clients add this tag to the name of a model."""
_DURATION = re.compile(r"[+-]?([0-9]{1,12}(\.[0-9]{0,12})?(ns|us|µs|ms|s|m|h))+")
_SECONDS_ALONE = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,12})?")
_LONGEST = 1e9
_PART_OF_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: JsonValue) -> JsonValue:
    """Go's notation of a duration, such as "1h30m", in seconds; -1 for every negative duration."""
    if isinstance(value, str) and _SECONDS_ALONE.fullmatch(value):
        value = float(value)
    elif isinstance(value, str):
        if not _DURATION.fullmatch(value):
            raise invalid('must be a number of seconds, or a duration such as "5m"')
        parts = _PART_OF_DURATION.findall(value)
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
        value = -1 if value.startswith("-") and seconds else seconds
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return -1 if value < 0 else min(value, _LONGEST)


KeepAlive = Annotated[float | None, BeforeValidator(_seconds, json_schema_input_type=float | str | None)]
_KEEP_ALIVE = Field(
    default=None,
    le=_LONGEST,
    description="How long the model then stays loaded without being used, in seconds or as in '5m'; 0: not at all, "
    "-1: for ever. What it is by default, its card or the server says.",
)
_MODEL = Field(
    min_length=1, max_length=300, description='A model id or alias, optionally with @runner; ":latest" may follow it.'
)

_TRUNCATE: bool = Field(default=True, description="Truncate a text that is too long for the model; false refuses it.")
_LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def _levels(value: JsonValue) -> JsonValue:
    if isinstance(value, bool) or value in _LEVELS:
        return "xhigh" if value == "max" else value
    raise invalid(f"must be true, false or one of {', '.join(map(repr, _LEVELS))}")


def _formats(value: JsonValue) -> JsonValue:
    if isinstance(value, dict) or value in ("", "json"):
        return value
    raise invalid("must be 'json' or a JSON Schema, which is an object")


def _as_list(value: JsonValue) -> JsonValue:
    return ([value] if value else []) if isinstance(value, str) else value


class OllamaBody(RequestBody):
    """Common fields of all bodies."""

    model: str = _MODEL
    keep_alive: KeepAlive = _KEEP_ALIVE

    @property
    def keep_seconds(self) -> float | None:
        """How long the model stays loaded afterwards without being used; None changes nothing."""
        return math.inf if self.keep_alive is not None and self.keep_alive < 0 else self.keep_alive


class OllamaGeneration(OllamaBody):
    """Common fields of chats and completions."""

    stream: bool = Field(default=True, description="Send the reply while it is generated, as lines of JSON.")
    format: Annotated[dict[str, JsonValue] | Literal["", "json"], BeforeValidator(_formats)] = Field(
        default="",
        description="'json' or a JSON Schema that the reply then follows.",
        json_schema_extra=honoured("grammar"),
    )
    options: OllamaOptions = Field(default=OllamaOptions(), description="Options of generation.")
    think: Annotated[
        bool | Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None,
        BeforeValidator(
            _levels,
            json_schema_input_type=bool | Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        ),
    ] = Field(
        default=None,
        description="Whether or how much the model should reason, if it can; a level limits the reasoning.",
    )
    max_reasoning_tokens: MaxReasoningTokens = None
    logprobs: bool = Field(
        default=False, description="Return the log-probability of each token.", json_schema_extra=honoured("logprobs")
    )
    top_logprobs: int = Field(
        default=0, ge=0, le=MAX_LOGPROBS, description="Also return this many alternatives; needs logprobs."
    )

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "OllamaGeneration":
        if self.top_logprobs and not self.logprobs:
            raise invalid("only allowed where logprobs is true", "top_logprobs")
        return self

    def generation(self, prompt: Prompt, prompt_field: str) -> GenerationRequest:
        """The request in no API's form."""
        schema = '{"type":"object"}' if self.format == "json" else to_json(self.format).decode()
        return GenerationRequest(
            prompts=(prompt,),
            prompt_field=prompt_field,
            sampling=self.options.sampling(),
            seed=self.options.seed,
            stop=tuple(self.options.stop),
            max_tokens=self.options.num_predict,
            constraint=OutputConstraint("json_schema", schema, "format") if self.format else None,
            logprobs=self.top_logprobs if self.logprobs else None,
            keep_seconds=self.keep_seconds,
            context=self.options.num_ctx or 0,
            context_param="options.num_ctx",
        )

    @property
    def effort(self) -> str | None:
        """The reasoning effort in no API's form."""
        if isinstance(self.think, bool):
            return "on" if self.think else "none"
        return self.think


class OllamaFunction(RequestBody):
    """A function that an earlier reply called."""

    index: int | None = Field(default=None, ge=0, description="Has no effect.")
    name: ToolName = Field(description="The name of the tool.")
    arguments: dict[str, JsonValue] = Field(description="An object.")


class OllamaCall(RequestBody):
    """A call in an earlier reply."""

    id: str | None = Field(default=None, max_length=256, description="The id that a result may refer to.")
    type: Literal["function"] = Field(default="function", description="The only supported type.")
    function: OllamaFunction = Field(description="The called function.")


class OllamaMessage(RequestBody):
    """One message."""

    role: Literal["system", "user", "assistant", "tool"] = Field(description="The role of the speaker.")
    content: str = Field(default="", description="The text; special tokens in it are ordinary text.")
    thinking: str | None = Field(default=None, description="From an earlier reply.")
    tool_calls: list[OllamaCall] = Field(default=[], max_length=MAX_TOOLS, description="From an earlier reply.")
    tool_name: str | None = Field(default=None, max_length=256, description="The tool whose result this is.")
    name: str | None = Field(default=None, max_length=256, description="Older name of tool_name.")
    tool_call_id: str | None = Field(default=None, max_length=256, description="The id of the call that this answers.")

    @model_validator(mode="after")
    def _calls_are_the_assistants(self) -> "OllamaMessage":
        if self.tool_calls and self.role != "assistant":
            raise invalid("only a message of the assistant has calls", "tool_calls")
        return self


def _with_pictures(messages: JsonValue) -> JsonValue:
    """Puts marks for a message's pictures before its text. The reply is about those in the last messages."""
    if not isinstance(messages, list):
        return messages
    last = len(messages) - 1
    while last > 0 and _role(messages[last]) == "assistant":
        last -= 1
    return [_with_marks(each, at, answered=at >= last) for at, each in enumerate(messages)]


def _role(message: JsonValue) -> JsonValue:
    return message.get("role") if isinstance(message, dict) else None


def _with_marks(message: JsonValue, at: int, *, answered: bool) -> JsonValue:
    if not isinstance(message, dict) or not isinstance(images := message.get("images"), list):
        return message
    paths = (f"{at}.images.{number}" for number in range(len(images)))
    marks = [bare_picture(each, "messages", path, answered=answered) for path, each in zip(paths, images, strict=True)]
    kept = {name: value for name, value in message.items() if name != "images"}
    content = message.get("content") or ""
    return {**kept, "content": "".join(marks) + content} if isinstance(content, str) else kept


def _marks(images: JsonValue) -> JsonValue:
    if not isinstance(images, list):
        return images
    return [bare_picture(each, "images", str(at), answered=True) for at, each in enumerate(images)]


_OF_CONTEXT: Unsupported = {"truncate": (False,), "shift": (False,)}
"""Ollama's treatment of conversations that are too long. Here they are an error."""


class OllamaChatRequest(OllamaGeneration):
    """The body of ``POST /api/chat``. Without messages it only loads the model."""

    ignored: ClassVar[Unsupported] = _OF_CONTEXT

    messages: Annotated[
        list[OllamaMessage], BeforeValidator(_with_pictures, json_schema_input_type=list[OllamaMessage])
    ] = Field(
        default=[],
        max_length=10_000,
        description="The conversation. If the last message is the assistant's, the reply continues it.",
    )
    tools: list[ToolDefinition] = Field(
        default=[], max_length=MAX_TOOLS, description="The tools that the model may call."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "OllamaChatRequest":
        check_tool_names([tool.function.name for tool in self.tools])
        return self

    def conversation(self) -> Conversation:
        """The prompt in no API's form."""
        last = self.messages[-1]
        return Conversation(
            messages=_told(self.messages),
            pictures=self.pictures,
            tools=tuple(tool.function.tool() for tool in self.tools),
            effort=self.effort,
            effort_param="think",
            reasoning_tokens=self.max_reasoning_tokens,
            continues=last.role == "assistant" and not last.tool_calls,
        )


class OllamaGenerateRequest(OllamaGeneration):
    """The body of ``POST /api/generate``. Without a prompt it only loads the model."""

    ignored: ClassVar[Unsupported] = _OF_CONTEXT

    unsupported: ClassVar[Unsupported] = {"context": ([],), "height": (), "steps": (), "template": ("",), "width": ()}

    prompt: str = Field(default="", description="The user's message; with raw, the complete prompt.")
    images: Annotated[list[str], BeforeValidator(_marks)] = Field(
        default=[], max_length=MOST_PICTURES, description="Pictures in base64, before the prompt."
    )
    system: str = Field(default="", description="A system message before the prompt.")
    raw: bool = Field(default=False, description="Use the prompt without the model's chat template.")
    suffix: str = Field(
        default="", description="Fill in the text between the prompt and this, without the chat template."
    )

    @model_validator(mode="after")
    def _raw_is_raw(self) -> "OllamaGenerateRequest":
        for name in ("system", "think", "max_reasoning_tokens", "images") if self.raw or self.suffix else ():
            if getattr(self, name) not in ("", None, []) and (self.raw or name == "images"):
                raise invalid(f"not accepted where {'raw is true' if self.raw else 'there is a suffix'}", name)
        return self

    def content(self) -> Prompt:
        """The prompt in no API's form."""
        if self.suffix:
            return Infill(prefix=self.prompt, suffix=self.suffix)
        if self.raw:
            return self.prompt
        system: list[dict[str, JsonValue]] = [{"role": "system", "content": self.system}] if self.system else []
        messages = (*system, {"role": "user", "content": "".join(self.images) + self.prompt})
        return Conversation(
            messages=messages,
            pictures=self.pictures,
            effort=self.effort,
            effort_param="think",
            reasoning_tokens=self.max_reasoning_tokens,
        )


class OllamaEmbedRequest(OllamaBody):
    """The body of ``POST /api/embed``."""

    input: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        default=[],
        max_length=MAX_INPUTS,
        description="One or several texts; each becomes one vector. Without any, the model is only loaded.",
        json_schema_extra=honoured("embeddings"),
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="Keep this many of a vector's first components, normalised to length 1."
    )
    truncate: bool = _TRUNCATE
    options: EmbedOptions = Field(default=EmbedOptions(), description="Only num_ctx has an effect.")


class OllamaEmbeddingsRequest(OllamaBody):
    """The body of ``POST /api/embeddings``, the older form."""

    prompt: str = Field(description="The text.", json_schema_extra=honoured("embeddings"))
    truncate: bool = _TRUNCATE
    options: EmbedOptions = Field(default=EmbedOptions(), description="Only num_ctx has an effect.")


class OllamaModelName(RequestBody):
    """Common fields of requests about a model, of which one is required."""

    model: str = Field(default="", max_length=300, description="A model id or alias.")
    name: str = Field(default="", max_length=300, description="Older name of model.")

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if not self.model and not self.name:
            raise missing("model")
        return self


class OllamaPullRequest(OllamaModelName):
    """The body of ``POST /api/pull``."""

    ignored: ClassVar[Unsupported] = {"insecure": (False,), "password": ("",), "username": ("",)}

    stream: bool = Field(default=True, description="Reply in lines of JSON.")


class OllamaShowRequest(OllamaModelName):
    """The body of ``POST /api/show``."""

    ignored: ClassVar[Unsupported] = {"options": ({},), "system": ("",), "template": ("",)}

    verbose: bool = Field(default=False, description="Has no effect: all information is always returned.")


def _told(messages: Sequence[OllamaMessage]) -> tuple[dict[str, JsonValue], ...]:
    """The conversation in OpenAI's form, in which ids connect calls and results."""
    conversation: list[dict[str, JsonValue]] = []
    waiting: list[tuple[OllamaCall, str]] = []
    for at, message in enumerate(messages):
        told: dict[str, JsonValue] = {"role": message.role, "content": message.content}
        if message.thinking:
            told["reasoning_content"] = message.thinking
        if message.tool_calls:
            waiting = [(call, short_id(f"{at}/{number}")) for number, call in enumerate(message.tool_calls)]
            told["tool_calls"] = [_call(call, identity) for call, identity in waiting]
        if message.role == "tool":
            if (name := message.tool_name or message.name) is not None:
                told["name"] = name
            if (answered := _answered(message, waiting)) is not None:
                waiting.remove(answered)
                told["tool_call_id"] = answered[1]
        conversation.append(told)
    return tuple(conversation)


def _answered(result: OllamaMessage, waiting: Sequence[tuple[OllamaCall, str]]) -> tuple[OllamaCall, str] | None:
    """The call of a result: the one with its id, or the first of the tool's name, or the first of all."""
    by_id = [each for each in waiting if each[0].id is not None and each[0].id == result.tool_call_id]
    by_name = [each for each in waiting if each[0].function.name == (result.tool_name or result.name)]
    return next(iter(by_id or by_name or waiting), None)


def _call(call: OllamaCall, identity: str) -> JsonValue:
    arguments = to_json(call.function.arguments).decode()
    return {"id": identity, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
