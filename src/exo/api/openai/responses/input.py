"""The input of a responses request: its items, and the conversation that they make."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue
from pydantic_core import to_json

from exo.api.http.body import RequestBody, Unsupported, invalid, note, unsupported
from exo.api.openai.messages import Arguments, CalledName, with_pictures
from exo.api.openai.responses.tools import custom_arguments, told_name
from exo.serving.pictures.prompt_pictures import joined

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")
_OUTPUTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output")
_VENDOR_ITEMS = (
    "additional_tools",
    "code_interpreter_call",
    "compaction",
    "compaction_summary",
    "compaction_trigger",
    "computer_call",
    "computer_call_output",
    "file_search_call",
    "ghost_snapshot",
    "image_generation_call",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "program",
    "program_output",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
)
"""Items of the vendor's own tools in a history. A model without these tools cannot use them."""


def _text_of(content: JsonValue) -> JsonValue:
    """Joins content in parts with line breaks. Other fields of an earlier reply's parts are dropped."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _TEXT_PARTS:
            raise unsupported(f"{kind!r} is not supported; accepted are input_text and output_text", f"{at}.type")
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if kind is None or not isinstance(text, str):
            raise invalid('must be {"type": "input_text", "text": "…"}', str(at))
        texts.append(text)
    return joined(texts)


PartsOrText = Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | list[dict[str, JsonValue]])]


class InputMessage(RequestBody):
    """A message of the client or of an earlier reply."""

    ignored: ClassVar[Unsupported] = {"phase": ("commentary", "final_answer")}

    type: Literal["message"] = Field(default="message", description="A message.")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="The role of the speaker.")
    content: PartsOrText = Field(default="", description="Text, or parts: input_text, output_text, input_image.")
    id: str | None = Field(default=None, max_length=256, description="Has no effect.")
    status: str | None = Field(default=None, max_length=32, description="Has no effect.")


class _InputCallBase(RequestBody):
    """Common fields of all calls."""

    call_id: str = Field(min_length=1, max_length=256, description="The id that its output refers to.")
    id: str | None = Field(default=None, max_length=256, description="Has no effect.")
    status: str | None = Field(default=None, max_length=32, description="Has no effect.")


class InputCall(_InputCallBase):
    """A call of an earlier reply."""

    type: Literal["function_call"] = Field(description="A call.")
    name: CalledName = Field(description="The name of the tool.")
    namespace: str | None = Field(default=None, max_length=256, description="The namespace of the tool, if it has one.")
    arguments: Arguments = Field(default="", description="JSON text as in the reply.")


class InputCustomCall(_InputCallBase):
    """A call of a custom tool in an earlier reply."""

    type: Literal["custom_tool_call"] = Field(description="A call.")
    name: CalledName = Field(description="The name of the tool.")
    namespace: str | None = Field(default=None, max_length=256, description="The namespace of the tool, if it has one.")
    input: str = Field(default="", description="The text that the tool was called with.")


class InputShellCall(_InputCallBase):
    """A call of OpenAI's local shell in an earlier reply. The model sees a function call."""

    type: Literal["local_shell_call"] = Field(description="A call.")
    action: dict[str, JsonValue] = Field(description="The command that was run.")


class InputCallOutput(_InputCallBase):
    """The result of a call."""

    type: Literal["function_call_output", "custom_tool_call_output", "local_shell_call_output"] = Field(
        description="The result of a call."
    )
    call_id: str = Field(
        default="",
        max_length=256,
        description="The id of the call that this answers; for local_shell, id is accepted, too.",
    )
    name: JsonValue = Field(default=None, description="Has no effect.")
    output: PartsOrText = Field(default="", description="Text, or parts of it.")


class InputReasoning(RequestBody):
    """The reasoning of an earlier reply."""

    ignored: ClassVar[Unsupported] = {"encrypted_content": ("",)}

    type: Literal["reasoning"] = Field(description="Reasoning.")
    summary: PartsOrText = Field(default="", description="Has no effect.")
    content: PartsOrText = Field(default="", description="Its text, for chat templates that read it.")
    id: str | None = Field(default=None, max_length=256, description="Has no effect.")
    status: str | None = Field(default=None, max_length=32, description="Has no effect.")


class InputReference(RequestBody):
    """A reference to an item of a stored response."""

    type: Literal["item_reference"] = Field(description="A reference.")
    id: str = Field(min_length=1, max_length=256, description="The id of the item.")


class VendorItem(RequestBody):
    """An item of one of the vendor's own tools. The model does not see it."""

    type: str = Field(description="The type of one of the vendor's own tools.")


InputItem = VendorItem | InputMessage | InputCall | InputCustomCall | InputShellCall | InputCallOutput | InputReasoning
_ITEMS: dict[str, type[InputItem | InputReference]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputCallOutput,
    "custom_tool_call": InputCustomCall,
    "custom_tool_call_output": InputCallOutput,
    "local_shell_call": InputShellCall,
    "local_shell_call_output": InputCallOutput,
    "reasoning": InputReasoning,
    "item_reference": InputReference,
}


def _item(value: JsonValue) -> InputItem | InputReference:
    """Validates by type, because a union would report one error for each of its members."""
    kind = value.get("type") or "message" if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _VENDOR_ITEMS:
        note(f"input.{kind}", "items of this type are left out, because no model here has the tool")
        return VendorItem(type=kind)
    if not (isinstance(value, dict) and isinstance(kind, str) and kind in _ITEMS):
        raise invalid(f"an item's type is one of {', '.join(_ITEMS)} (got {str(kind)[:80]!r})", "type")
    if kind.startswith("local_shell_call") and "call_id" not in value:
        value = {"call_id": value.get("id"), **value}
    return _ITEMS[kind].model_validate(value)


def _items(value: JsonValue) -> JsonValue:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return with_pictures(value, "input", _OUTPUTS, "output")


Input = Annotated[
    list[Annotated[InputItem | InputReference, BeforeValidator(_item)]],
    BeforeValidator(_items, json_schema_input_type=str | list[InputItem | InputReference]),
]


def stored_item(stored: JsonValue) -> InputItem:
    """An item of a stored response as input."""
    item = _item(stored)
    assert not isinstance(item, InputReference)
    return item


def told(items: list[InputItem]) -> list[dict[str, JsonValue]]:
    """The items as messages for a chat template. Calls and reasoning join the assistant's message next to them."""
    messages: list[dict[str, JsonValue]] = []

    def assistant() -> dict[str, JsonValue]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    def add_call(item: InputCall | InputCustomCall | InputShellCall, name: str, arguments: str) -> None:
        call: JsonValue = {"id": item.call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        calls = assistant().setdefault("tool_calls", [])
        assert isinstance(calls, list)
        calls.append(call)

    for item in items:
        match item:
            case InputMessage(role="assistant"):
                last = assistant()
                if last["content"] or "tool_calls" in last:
                    messages.append({"role": "assistant", "content": item.content})
                else:
                    last["content"] = item.content
            case InputMessage():
                messages.append({"role": item.role, "content": item.content})
            case InputCall():
                add_call(item, told_name(item.namespace, item.name), item.arguments)
            case InputCustomCall():
                add_call(item, told_name(item.namespace, item.name), custom_arguments(item.input))
            case InputShellCall():
                add_call(item, "local_shell", to_json(item.action).decode())
            case InputCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            case VendorItem():
                pass
            case InputReasoning():
                if item.content:
                    messages.append({"role": "assistant", "content": "", "reasoning_content": item.content})
    return messages


def stored_input(item: InputItem, number: str) -> dict[str, JsonValue]:
    """Returns the item in the form of a response's input list. ``number`` makes an id for an item without one."""
    if isinstance(item, VendorItem):
        return {"type": item.type}
    own = item.id
    match item:
        case InputMessage():
            kind = "output_text" if item.role == "assistant" else "input_text"
            part: dict[str, JsonValue] = {"type": kind, "text": item.content}
            content = {**part, "annotations": []} if kind == "output_text" else part
            fields: dict[str, JsonValue] = {"id": own or f"msg_{number}", "role": item.role, "content": [content]}
        case InputCall():
            call = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            fields = {"id": own or f"fc_{number}", **call, **_namespace(item.namespace)}
        case InputCustomCall():
            call = {"call_id": item.call_id, "name": item.name, "input": item.input}
            fields = {"id": own or f"ctc_{number}", **call, **_namespace(item.namespace)}
        case InputShellCall():
            fields = {"id": own or f"lsh_{number}", "call_id": item.call_id, "action": item.action}
        case InputCallOutput():
            fields = {"id": own or f"fco_{number}", "call_id": item.call_id, "output": item.output}
        case InputReasoning():
            thought: JsonValue = [{"type": "reasoning_text", "text": item.content}]
            fields = {"id": own or f"rs_{number}", "summary": [], "content": thought}
    return {"type": item.type, "status": item.status or "completed", **fields}


def _namespace(namespace: str | None) -> dict[str, JsonValue]:
    return {"namespace": namespace} if namespace else {}
