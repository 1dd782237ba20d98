"""OpenAI's responses: the request, and the conversation that it adds to."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_json

from exo.api.fields import RequestBody, Unsupported, few, honoured, invalid, unsupported
from exo.api.openai_chat_requests import MAX_TOOLS, FunctionDefinition, ToolName
from exo.api.request import Constraint
from exo.chat.tools import NamedChoice, Tool, ToolChoice
from exo.worker.messages import MAX_LOGPROBS

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")
LOGPROBS = "message.output_text.logprobs"


def _text_of(content: JsonValue) -> JsonValue:
    """Content given in parts as one string, a line each; what else an earlier reply's parts hold is left out."""
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
    return "\n".join(texts)


PartsOrText = Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | list[dict[str, JsonValue]])]


class InputMessage(RequestBody):
    """A message, of the client's or of an earlier reply."""

    unsupported: ClassVar[Unsupported] = {"phase": ("commentary", "final_answer")}

    type: Literal["message"] = Field(default="message", description="A message.")
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: PartsOrText = Field(description="Text, or parts of type input_text and output_text.")
    id: str | None = Field(default=None, max_length=256, description="Has no effect.")
    status: str | None = Field(default=None, max_length=32, description="Has no effect.")


class InputCall(RequestBody):
    """A call of an earlier reply."""

    type: Literal["function_call"] = Field(description="A call.")
    call_id: str = Field(min_length=1, max_length=256, description="What its output refers to.")
    name: ToolName = Field(description="Of the tool.")
    arguments: str = Field(description="JSON text, as the reply had it.")
    id: str | None = Field(default=None, max_length=256, description="Has no effect.")
    status: str | None = Field(default=None, max_length=32, description="Has no effect.")


class InputCallOutput(RequestBody):
    """What a call gave."""

    type: Literal["function_call_output"] = Field(description="What a call gave.")
    call_id: str = Field(min_length=1, max_length=256, description="Of the call that this answers.")
    output: PartsOrText = Field(description="Text, or parts of it.")
    id: str | None = Field(default=None, max_length=256, description="Has no effect.")
    status: str | None = Field(default=None, max_length=32, description="Has no effect.")


class InputReasoning(RequestBody):
    """The reasoning of an earlier reply."""

    unsupported: ClassVar[Unsupported] = {"encrypted_content": ("",)}

    type: Literal["reasoning"] = Field(description="Reasoning.")
    summary: PartsOrText = Field(default="", description="Has no effect.")
    content: PartsOrText = Field(default="", description="Its text, for chat templates that take it back.")
    id: str | None = Field(default=None, max_length=256, description="Has no effect.")
    status: str | None = Field(default=None, max_length=32, description="Has no effect.")


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning
_ITEMS: dict[str, type[InputItem]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputCallOutput,
    "reasoning": InputReasoning,
}


def _item(value: JsonValue) -> InputItem:
    """By its type, since a union would explain what is wrong with each of its members."""
    kind = value.get("type", "message") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise invalid(f"an item's type is one of {', '.join(_ITEMS)}", "type")
    return _ITEMS[kind].model_validate(value)


def _items(value: JsonValue) -> JsonValue:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="The only one there is.")
    strict: bool = Field(default=True, description="Arguments that a call is forced into always follow the schema.")


class NamedFunctionTool(RequestBody):
    """Demands a call of this tool."""

    type: Literal["function"] = Field(description="The only one there is.")
    name: str = Field(description="Of a function among the tools.")


class TextFormat(RequestBody):
    """What the text is to look like."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        default="text", description="Anything, any JSON object, or JSON that follows schema."
    )
    name: str = Field(default="", max_length=256, description="Has no effect.")
    description: str | None = Field(default=None, description="Has no effect.")
    schema_: dict[str, JsonValue] | bool | None = Field(
        default=None, alias="schema", description="A JSON Schema; needed by the type json_schema, and only there."
    )
    strict: bool | None = Field(default=None, description="Has no effect: the schema is always followed.")

    @model_validator(mode="after")
    def _schema_where_due(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise invalid("goes with the type json_schema and no other", "schema")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What the output must match."""
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.schema_ is None else self.schema_
        where = "text.format" if self.schema_ is None else "text.format.schema"
        return Constraint("json_schema", to_json(schema).decode(), where)


class TextConfig(RequestBody):
    """How the text is to be."""

    unsupported: ClassVar[Unsupported] = {"verbosity": ("medium",)}

    format: TextFormat = Field(
        default=TextFormat(), description="What the text is to look like.", json_schema_extra=honoured("grammar")
    )


class ReasoningConfig(RequestBody):
    """How much the model is to reason."""

    unsupported: ClassVar[Unsupported] = {"generate_summary": (), "summary": ("auto",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None, description="For models whose chat template knows it, or can switch reasoning off."
    )


class ResponsesRequest(RequestBody):
    """The body of ``POST /v1/responses``."""

    unsupported: ClassVar[Unsupported] = {
        "background": (False,),
        "conversation": (),
        "max_tool_calls": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }

    model: str = Field(min_length=1, max_length=300, description="A model id or alias, optionally with @runner.")
    input: Annotated[
        list[Annotated[InputItem, BeforeValidator(_item)]],
        BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
    ] = Field(
        min_length=1, max_length=10_000, description="What the user says, or items: messages, calls and their outputs."
    )
    instructions: str | None = Field(default=None, description="A system message that is not stored.")
    previous_response_id: str | None = Field(
        default=None, max_length=256, description="Go on after this response, if it is still in this server's memory."
    )
    store: bool = Field(default=True, description="Keep input and output in memory, until newer ones need the room.")
    stream: bool = Field(default=False, description="Tell the reply as it is made, in server-sent events.")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 always takes the most probable token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Keep the most probable tokens up to this sum.")
    max_output_tokens: int | None = Field(
        default=None, ge=1, le=1 << 31, description="Null: until the context is full."
    )
    tools: list[FunctionTool] = Field(default=[], max_length=MAX_TOOLS, description="What the model may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool = Field(
        default="auto",
        description="With 'required' or a name, the reply is a call that follows its schema.",
        json_schema_extra=honoured("grammar"),
    )
    parallel_tool_calls: bool = Field(default=True, description="Whether one reply may call several times.")
    text: TextConfig = Field(default=TextConfig(), description="How the text is to be.")
    reasoning: ReasoningConfig = Field(default=ReasoningConfig(), description="How much the model is to reason.")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        default=[],
        description=f"{LOGPROBS}: each token's log-probability. reasoning.encrypted_content has no effect: reasoning "
        "is not encrypted.",
        json_schema_extra=honoured("logprobs"),
    )
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS, description=f"Needs {LOGPROBS} in include.")
    metadata: Annotated[dict[str, str], BeforeValidator(few)] = Field(default={}, description="Is returned.")
    user: str | None = Field(default=None, max_length=512, description="Has no effect.")
    prompt_cache_key: str | None = Field(default=None, max_length=512, description="Has no effect.")
    safety_identifier: str | None = Field(default=None, max_length=512, description="Has no effect.")

    @model_validator(mode="after")
    def _a_choice_of_tools(self) -> "ResponsesRequest":
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise invalid("two tools have the same name", "tools")
        if isinstance(self.tool_choice, NamedFunctionTool) and self.tool_choice.name not in names:
            raise invalid(f"there is no such tool; given are {', '.join(names) or 'none'}", "tool_choice.name")
        if self.tool_choice == "required" and not names:
            raise invalid("there are no tools to choose from", "tool_choice")
        if self.choice not in ("auto", "none") and self.text.format.constraint is not None:
            raise invalid("not accepted together with text.format", "tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise invalid(f"only allowed where include has {LOGPROBS}", "top_logprobs")
        return self

    @property
    def logprobs(self) -> bool:
        """Whether tokens' log-probabilities are to be told."""
        return LOGPROBS in self.include

    @property
    def choice(self) -> ToolChoice:
        """What is to be called, in no dialect."""
        return (
            NamedChoice(self.tool_choice.name) if isinstance(self.tool_choice, NamedFunctionTool) else self.tool_choice
        )

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """What may be called, in no dialect."""
        if self.tool_choice == "none":
            return ()
        return tuple(each.tool() for each in self.tools)


def told(items: list[InputItem]) -> list[dict[str, JsonValue]]:
    """The items as messages for a chat template: calls and reasoning belong to the assistant's message beside them."""
    messages: list[dict[str, JsonValue]] = []

    def assistant() -> dict[str, JsonValue]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

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
                call: JsonValue = {
                    "id": item.call_id,
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                calls = assistant().setdefault("tool_calls", [])
                assert isinstance(calls, list)
                calls.append(call)
            case InputCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            case InputReasoning():
                if item.content:
                    messages.append({"role": "assistant", "content": "", "reasoning_content": item.content})
    return messages


def stored_input(item: InputItem, number: str) -> dict[str, JsonValue]:
    """The item as it is told to whoever asks for a response's input. ``number`` makes an id for one that has none."""
    own = item.id
    match item:
        case InputMessage():
            kind = "output_text" if item.role == "assistant" else "input_text"
            part: dict[str, JsonValue] = {"type": kind, "text": item.content}
            content = {**part, "annotations": []} if kind == "output_text" else part
            fields: dict[str, JsonValue] = {"id": own or f"msg_{number}", "role": item.role, "content": [content]}
        case InputCall():
            call = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            fields = {"id": own or f"fc_{number}", **call}
        case InputCallOutput():
            fields = {"id": own or f"fco_{number}", "call_id": item.call_id, "output": item.output}
        case InputReasoning():
            thought: JsonValue = [{"type": "reasoning_text", "text": item.content}]
            fields = {"id": own or f"rs_{number}", "summary": [], "content": thought}
    return {"type": item.type, "status": item.status or "completed", **fields}
