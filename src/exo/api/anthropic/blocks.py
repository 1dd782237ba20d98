"""Anthropic's messages: content blocks, and the conversation in the form of chat templates."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic_core import to_json

from exo.api.http.body import RequestBody, Unsupported, invalid, missing, unsupported
from exo.chat.template.reshaping import short_id
from exo.serving.pictures.prompt_pictures import joined

MAX_BLOCKS = 10_000
_TEXT_ONLY = ("text",)


class CacheControl(RequestBody):
    """Marks a prompt for caching. It has no effect: every prompt is cached up to its first difference from the next."""

    ignored: ClassVar[Unsupported] = {"scope": ("global", "organization")}

    type: Literal["ephemeral"] = Field(default="ephemeral", description="Has no effect.")
    ttl: Literal["5m", "1h"] | None = Field(default=None, description="Has no effect.")


class Block(RequestBody):
    """Common fields of all content blocks."""

    cache_control: CacheControl | None = Field(default=None, description="Has no effect: all prompts are cached.")


class TextBlock(Block):
    """Text."""

    ignored: ClassVar[Unsupported] = {"citations": ([],)}

    type: Literal["text"] = Field(description="Text.")
    text: str = Field(description="The text; special tokens in it are ordinary text.")


class ThinkingBlock(Block):
    """Reasoning of an earlier reply."""

    type: Literal["thinking"] = Field(description="Reasoning.")
    thinking: str = Field(description="Its text, for chat templates that read it.")
    signature: str = Field(default="", description="Has no effect.")


class ToolUseBlock(Block):
    """A call in an earlier reply."""

    ignored: ClassVar[Unsupported] = {"caller": ({"type": "direct"},), "toolset_name": ()}

    type: Literal["tool_use"] = Field(description="A call.")
    id: str = Field(min_length=1, max_length=256, description="The id that its result refers to.")
    name: str = Field(min_length=1, max_length=128, description="The name of the tool.")
    input: dict[str, JsonValue] = Field(description="The arguments.")


def _kind(value: JsonValue) -> JsonValue:
    return value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)


def _known(value: JsonValue, kinds: Sequence[str]) -> JsonValue:
    """Refuses wrong types here, because a union would report one error for each of its types."""
    if not isinstance(value, Mapping):
        raise invalid('must be an object such as {"type": "text", "text": "…"}')
    kind = _kind(value)
    if kind is None:
        raise missing("type")
    if kind not in kinds:
        accepted = ", ".join(repr(each) for each in kinds)
        raise unsupported(f"{str(kind)[:80]!r} is not supported here; accepted are {accepted}", "type")
    return value


def _as_blocks(content: JsonValue) -> JsonValue:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


PlainBlock = Annotated[TextBlock, BeforeValidator(lambda value: _known(value, _TEXT_ONLY))]
PlainContent = Annotated[
    list[PlainBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]), Field(max_length=1024)
]
"""Text, as one string or in blocks."""


class ToolResultBlock(Block):
    """The result of a call."""

    ignored: ClassVar[Unsupported] = {"toolset_name": ()}

    type: Literal["tool_result"] = Field(description="A result.")
    tool_use_id: str = Field(min_length=1, max_length=256, description="The id of the call that this answers.")
    content: PlainContent = Field(default=[], description="Text, as a string or in blocks, and pictures.")
    is_error: bool = Field(
        default=False, description="Puts 'Error: ' before the text, because chat templates have no flag."
    )


_BLOCKS = ("text", "thinking", "tool_use", "tool_result")
# The tags are in brackets so that an error's path can omit them: they are no fields of the request.
AnyBlock = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ThinkingBlock, Tag("[thinking]")]
    | Annotated[ToolUseBlock, Tag("[tool_use]")]
    | Annotated[ToolResultBlock, Tag("[tool_result]")],
    Discriminator(lambda value: f"[{_kind(value)}]"),
    BeforeValidator(lambda value: _known(value, _BLOCKS)),
]
AnyContent = Annotated[
    list[AnyBlock],
    BeforeValidator(
        _as_blocks, json_schema_input_type=str | list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]
    ),
    Field(max_length=MAX_BLOCKS),
]

_WHOSE: Mapping[str, tuple[str, ...]] = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": _TEXT_ONLY,
}
"""The allowed blocks of each role."""


class AnthropicMessage(RequestBody):
    """One message. Adjacent messages of one role count as one."""

    role: Literal["user", "assistant", "system"] = Field(description="The role of the speaker.")
    content: AnyContent = Field(
        description="Text, or blocks: text; for the user also image (base64 of a PNG, JPEG, WebP or GIF) and "
        "tool_result, for the assistant thinking and tool_use."
    )

    @model_validator(mode="after")
    def _has_blocks_of_its_role(self) -> "AnthropicMessage":
        for at, block in enumerate(self.content):
            if block.type not in _WHOSE[self.role]:
                raise invalid(f"{block.type!r} is not for a message of role {self.role!r}", f"content.{at}.type")
        return self


def plain_text(blocks: Iterable[TextBlock]) -> str:
    """Joins blocks of text with line breaks, but pictures without."""
    return joined([block.text for block in blocks])


def check_results(messages: Sequence[AnthropicMessage]) -> None:
    """Raises ``PydanticCustomError`` for a tool's result that answers no call before it."""
    called: set[str] = set()
    for at, message in enumerate(messages):
        for number, block in enumerate(message.content):
            if isinstance(block, ToolUseBlock):
                called.add(block.id)
            elif isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
                where = f"messages.{at}.content.{number}.tool_use_id"
                raise invalid("there is no tool_use block of this id before it", where)


def told(system: str, messages: Sequence[AnthropicMessage]) -> tuple[dict[str, JsonValue], ...]:
    """The conversation in OpenAI's form."""
    conversation: list[dict[str, JsonValue]] = [{"role": "system", "content": system}] if system else []
    for role, turns in groupby(messages, key=lambda message: message.role):
        blocks = [block for turn in turns for block in turn.content]
        if role == "assistant":
            conversation.append(_assistants(blocks))
        else:
            conversation += _others(role, blocks)
    return tuple(conversation)


def _others(role: str, blocks: Iterable[AnyBlock]) -> Iterable[dict[str, JsonValue]]:
    """Tool results become messages of their own, with the text in between."""
    for is_result, run in groupby(blocks, key=lambda block: isinstance(block, ToolResultBlock)):
        if is_result:
            yield from (_result(block) for block in run if isinstance(block, ToolResultBlock))
        else:
            yield {"role": role, "content": plain_text(block for block in run if isinstance(block, TextBlock))}


def _result(block: ToolResultBlock) -> dict[str, JsonValue]:
    content = ("Error: " if block.is_error else "") + plain_text(block.content)
    return {"role": "tool", "tool_call_id": short_id(block.tool_use_id), "content": content}


def _assistants(blocks: Sequence[AnyBlock]) -> dict[str, JsonValue]:
    """An earlier reply. Its blocks of text are parts of one text, so they are joined without line breaks."""
    message: dict[str, JsonValue] = {"role": "assistant"}
    message["content"] = "".join(block.text for block in blocks if isinstance(block, TextBlock))
    if reasoning := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
        message["reasoning_content"] = reasoning
    if calls := [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> JsonValue:
    function: dict[str, JsonValue] = {"name": block.name, "arguments": to_json(block.input).decode()}
    return {"id": short_id(block.id), "type": "function", "function": function}
