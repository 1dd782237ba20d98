"""The messages of OpenAI's chat requests in the forms of many clients and servers."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, ValidationInfo, model_validator
from pydantic_core import to_json

from exo.api.http.body import RequestBody, Unsupported, invalid, missing, note, unsupported
from exo.api.http.picture_parts import PICTURE_PARTS, picture_text
from exo.api.openai.tools import MAX_TOOLS
from exo.serving.pictures.prompt_pictures import joined

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")


def text_of(content: JsonValue, info: ValidationInfo) -> JsonValue:
    """Joins content in parts with line breaks. Pictures have become marks before."""
    if not isinstance(content, list):
        return content
    where = info.field_name or ""
    texts: list[str] = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not (isinstance(part, dict) and isinstance(kind, str)):
            raise invalid('must be {"type": "text", "text": "…"}', str(at))
        if kind in REASONING_PARTS:
            note(f"{where}.{kind}", "reasoning inside content is left out")
            continue
        if kind not in TEXT_PARTS:
            raise unsupported(f"{kind[:80]!r} is not supported; accepted is 'text'", f"{at}.type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise invalid("must be a string", f"{at}.{'refusal' if kind == 'refusal' else 'text'}")
        for name, value in part.items():
            if name not in ("type", "text", "refusal", "annotations", "logprobs") and value is not None:
                note(f"{where}.{name[:64]}", "has no effect in a part of the content")
        texts.append(text)
    return joined(texts)


def with_pictures(entries: JsonValue, where: str, results: tuple[str, ...], content: str) -> JsonValue:
    """Replaces the pictures in messages or items by marks in their text.

    An agent cannot take a picture out of its history again. Therefore those in the results of calls may remain unseen,
    except in the results that the reply answers. ``where`` is the field of ``entries``, ``results`` the roles or types
    of a result, and ``content`` its field that may hold parts.
    """
    if not isinstance(entries, list):
        return entries
    last = len(entries)
    while last and _is_result(entries[last - 1], results):
        last -= 1
    return [
        _with_marks(entry, where, str(at), content, answered=at >= last or not _is_result(entry, results))
        for at, entry in enumerate(entries)
    ]


def _is_result(entry: JsonValue, results: tuple[str, ...]) -> bool:
    return isinstance(entry, dict) and (entry.get("role") in results or entry.get("type") in results)


def _with_marks(entry: JsonValue, where: str, at: str, content: str, *, answered: bool) -> JsonValue:
    if not isinstance(entry, dict):
        return entry
    field = content if isinstance(entry.get(content), list) else "content"
    parts = entry.get(field)
    if not isinstance(parts, list):
        return entry
    return {
        **entry,
        field: [
            picture_text(part, where, f"{at}.{field}.{number}", answered=answered)
            if isinstance(part, dict) and part.get("type") in PICTURE_PARTS
            else part
            for number, part in enumerate(parts)
        ],
    }


Content = Annotated[str, BeforeValidator(text_of, json_schema_input_type=str | list[dict[str, JsonValue]])]


def _as_json_text(arguments: JsonValue) -> JsonValue:
    return arguments if isinstance(arguments, str) else to_json(arguments).decode()


CalledName = Annotated[str, Field(min_length=1, max_length=256)]
"""The name of a tool that was called earlier, perhaps on a server with other rules."""
Arguments = Annotated[str, BeforeValidator(_as_json_text, json_schema_input_type=str | dict[str, JsonValue])]


class CalledFunction(RequestBody):
    """A function that an earlier reply called."""

    name: CalledName = Field(description="The name of the tool.")
    arguments: Arguments = Field(default="", description="JSON text as in the reply, or the object itself.")


class PastToolCall(RequestBody):
    """A call in an earlier reply."""

    id: str = Field(default="", max_length=256, description="The id that its result refers to.")
    type: Literal["function"] = Field(default="function", description="The only supported type.")
    function: CalledFunction = Field(description="The called function.")
    index: JsonValue = Field(default=None, description="Has no effect.")


class ChatMessage(RequestBody):
    """One message."""

    unsupported: ClassVar[Unsupported] = {"audio": (), "function_call": ()}
    ignored: ClassVar[Unsupported] = {
        "annotations": ([],),
        "cache_control": (),
        "provider_specific_fields": ({},),
        "reasoning_details": ([],),
        "thinking_blocks": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="The role of the speaker.")
    content: Content = Field(
        default="",
        description="Text, or parts of type text and image_url; special tokens in it are ordinary text. A picture is a "
        "data: URL of a PNG, JPEG, WebP or GIF. May be left out by the assistant and by tools.",
    )
    reasoning_content: str | None = Field(default=None, description="From an earlier reply.")
    reasoning: str | None = Field(default=None, description="Other servers' name of reasoning_content.")
    refusal: str | None = Field(default=None, description="From an earlier reply; replaces missing content.")
    tool_calls: list[PastToolCall] = Field(default=[], max_length=MAX_TOOLS, description="From an earlier reply.")
    name: str | None = Field(
        default=None,
        max_length=256,
        description="The name of the speaker or the tool, for chat templates that read it.",
    )
    tool_call_id: str | None = Field(default=None, max_length=256, description="The id of the call that this answers.")

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if "content" not in self.model_fields_set and self.role not in ("assistant", "tool"):
            raise missing("content")
        if self.tool_calls and self.role != "assistant":
            raise invalid("only a message of the assistant has calls", "tool_calls")
        return self

    def told(self) -> dict[str, JsonValue]:
        """The message in the form of chat templates."""
        message = self.model_dump(exclude_unset=True, exclude_none=True, exclude={"reasoning", "refusal"})
        message["content"] = self.content or self.refusal or ""
        if self.reasoning and not self.reasoning_content:
            message["reasoning_content"] = self.reasoning
        for call in message.get("tool_calls", ()):
            call.pop("index", None)
        return message


ChatMessages = Annotated[
    list[ChatMessage], BeforeValidator(lambda messages: with_pictures(messages, "messages", ("tool",), "content"))
]
