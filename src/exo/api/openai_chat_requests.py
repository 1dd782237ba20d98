"""OpenAI's chat requests: messages, tools and what a reply is to look like."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, model_validator
from pydantic_core import to_json

from exo.api.fields import RequestBody, Unsupported, few, honoured, invalid, missing, note, unsupported
from exo.api.openai_requests import UNSUPPORTED, GenerationFields, NoLimit
from exo.api.request import Constraint
from exo.chat.tools import NamedChoice, Tool, ToolChoice
from exo.worker.messages import MAX_LOGPROBS

MAX_TOOLS = 4096
_CHOICES = ("none", "auto", "required")
_ANY_OBJECT = '{"type":"object"}'


TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")
PICTURE_PARTS = ("image_url", "input_image", "image")
UNSEEN = "[a picture that this model cannot see]"


def text_of(content: JsonValue, info: ValidationInfo) -> JsonValue:
    """Content given in parts as one string, a line each."""
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
    return "\n".join(texts)


def with_unseen_pictures(entries: JsonValue, where: str, results: str, content: str) -> JsonValue:
    """Puts words in the place of pictures in the results of calls, but for those that the reply is to answer.

    An agent cannot take a picture out of its history again, so an error would end its session. ``where`` is the field
    of ``entries``, ``results`` the role or type of a result, and ``content`` its field that may hold parts.
    """
    if not isinstance(entries, list):
        return entries
    last = len(entries)
    while last and _is_result(entries[last - 1], results):
        last -= 1
    return [
        _without_pictures(entry, where, content) if at < last and _is_result(entry, results) else entry
        for at, entry in enumerate(entries)
    ]


def _is_result(entry: JsonValue, results: str) -> bool:
    return isinstance(entry, dict) and results in (entry.get("role"), entry.get("type"))


def _without_pictures(entry: JsonValue, where: str, content: str) -> JsonValue:
    parts = entry.get(content) if isinstance(entry, dict) else None
    if not (isinstance(entry, dict) and isinstance(parts, list)):
        return entry
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    seen: list[JsonValue] = [
        {"type": "text", "text": UNSEEN} if kind in PICTURE_PARTS else part
        for kind, part in zip(kinds, parts, strict=True)
    ]
    for kind in kinds:
        if kind in PICTURE_PARTS:
            note(f"{where}.{content}.{kind}", f"the model reads {UNSEEN!r} in the place of an earlier result's picture")
    return {**entry, content: seen}


def _without_unseen_pictures(messages: JsonValue) -> JsonValue:
    return with_unseen_pictures(messages, "messages", "tool", "content")


Content = Annotated[str, BeforeValidator(text_of, json_schema_input_type=str | list[dict[str, JsonValue]])]


Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh"],
    BeforeValidator(
        lambda effort: "xhigh" if effort == "max" else effort,
        json_schema_input_type=Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    ),
]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


def _of_an_object(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if schema.get("type", "object") != "object":
        raise invalid("must be 'object', which arguments always are", "type")
    return schema


Parameters = Annotated[dict[str, JsonValue], AfterValidator(_of_an_object)]
"""JSON Schema of a tool's arguments."""


def _as_json_text(arguments: JsonValue) -> JsonValue:
    return arguments if isinstance(arguments, str) else to_json(arguments).decode()


CalledName = Annotated[str, Field(min_length=1, max_length=256)]
"""Of a tool that was called earlier, perhaps by another server's rules."""
Arguments = Annotated[str, BeforeValidator(_as_json_text, json_schema_input_type=str | dict[str, JsonValue])]


class CalledFunction(RequestBody):
    """What an earlier reply called."""

    name: CalledName = Field(description="Of the tool.")
    arguments: Arguments = Field(default="", description="JSON text as the reply had it, or the object itself.")


class MessageToolCall(RequestBody):
    """A call in an earlier reply."""

    id: str = Field(default="", max_length=256, description="What its result refers to.")
    type: Literal["function"] = Field(default="function", description="The only one there is.")
    function: CalledFunction = Field(description="What is called.")
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

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: Content = Field(
        default="",
        description="Text, or parts of type text; special tokens in it are ordinary text. May be left out by the "
        "assistant and by tools.",
    )
    reasoning_content: str | None = Field(default=None, description="Of an earlier reply.")
    reasoning: str | None = Field(default=None, description="Other servers' name of reasoning_content.")
    refusal: str | None = Field(default=None, description="Of an earlier reply; stands for content that is left out.")
    tool_calls: list[MessageToolCall] = Field(default=[], max_length=MAX_TOOLS, description="Of an earlier reply.")
    name: str | None = Field(
        default=None, max_length=256, description="Of the speaker or the tool, for chat templates that read it."
    )
    tool_call_id: str | None = Field(default=None, max_length=256, description="Of the call that this answers.")

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if "content" not in self.model_fields_set and self.role not in ("assistant", "tool"):
            raise missing("content")
        if self.tool_calls and self.role != "assistant":
            raise invalid("only a message of the assistant has calls", "tool_calls")
        return self

    def told(self) -> dict[str, JsonValue]:
        """The message as a chat template reads it."""
        message = self.model_dump(exclude_unset=True, exclude_none=True, exclude={"reasoning", "refusal"})
        message["content"] = self.content or self.refusal or ""
        if self.reasoning and not self.reasoning_content:
            message["reasoning_content"] = self.reasoning
        for call in message.get("tool_calls", ()):
            call.pop("index", None)
        return message


class FunctionDefinition(RequestBody):
    """A function that the model may call."""

    name: ToolName = Field(description="What the model calls it by.")
    description: str = Field(default="", description="What it does, for the model.")
    parameters: Parameters = Field(
        default={"type": "object", "properties": {}}, description="JSON Schema of the arguments, an object."
    )
    strict: bool = Field(default=False, description="Arguments that a call is forced into always follow the schema.")

    def tool(self) -> Tool:
        """The same in no dialect."""
        return Tool(self.name, self.description, self.parameters, self.strict)


class ToolDefinition(RequestBody):
    """One tool."""

    type: Literal["function"] = Field(default="function", description="The only one there is.")
    function: FunctionDefinition = Field(description="What may be called.")


class NamedFunction(RequestBody):
    """The name of one of the tools."""

    name: str = Field(description="Of a function among the tools.")


class NamedTool(RequestBody):
    """Demands a call of this tool."""

    type: Literal["function"] = Field(description="The only one there is.")
    function: NamedFunction = Field(description="Which one.")


class JsonSchema(RequestBody):
    """A JSON Schema that the reply must follow, whether ``strict`` or not."""

    name: JsonValue = Field(default=None, description="Has no effect.")
    description: JsonValue = Field(default=None, description="Has no effect.")
    schema_: dict[str, JsonValue] | bool = Field(default=True, alias="schema", description="A JSON Schema.")
    strict: bool | None = Field(default=None, description="Has no effect: the schema is always followed.")


class ResponseFormat(RequestBody):
    """What the reply is to look like."""

    unsupported: ClassVar[Unsupported] = {"grammar": ("",)}

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Anything, any JSON object, or JSON that follows json_schema."
    )
    json_schema: JsonSchema | None = Field(default=None, description="Needed by the type of its name, and only there.")
    schema_: dict[str, JsonValue] | bool | None = Field(
        default=None, alias="schema", description="A JSON Schema, as llama-server has it; not where type is text."
    )

    @model_validator(mode="after")
    def _schema_where_due(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise missing("json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise invalid(f"not accepted where type is {self.type!r}", "json_schema")
        if self.schema_ is not None and (self.type == "text" or self.json_schema is not None):
            other = f"where type is {self.type!r}" if self.type == "text" else "together with json_schema"
            raise invalid(f"not accepted {other}", "schema")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What the output must match."""
        if self.type == "text":
            return None
        if self.schema_ is not None:
            return Constraint("json_schema", to_json(self.schema_).decode(), "response_format.schema")
        if self.json_schema is None:
            return Constraint("json_schema", _ANY_OBJECT, "response_format")
        schema = to_json(self.json_schema.schema_).decode()
        return Constraint("json_schema", schema, "response_format.json_schema.schema")


class VendorTool(RequestBody):
    """A tool that only its vendor can run: the model is not told of it."""

    type: str = Field(description="Any other type.")


def vendor_tool(kind: str, field: str) -> VendorTool:
    """Makes one, with a warning."""
    note(f"{field}.{kind[:64]}", "no tool of this type can be run here, and the model is not told of it")
    return VendorTool(type=kind)


def _tool(value: JsonValue) -> ToolDefinition | VendorTool:
    """By its type, since a union would explain what is wrong with each of its members."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom"):
        return vendor_tool(kind, "tools")
    return ToolDefinition.model_validate(value)


def _by_type(value: JsonValue) -> JsonValue:
    """Refused here, since a union would explain what is wrong with each of its types."""
    if isinstance(value, dict) and value.get("type") in (*_CHOICES, "any"):
        value = value["type"]
    if value == "any":
        return "required"
    if value in _CHOICES:
        return value
    if not isinstance(value, dict):
        raise invalid('must be \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": "…"}}')
    if (kind := value.get("type")) != "function":
        raise unsupported(f"only functions can be called (got {str(kind)[:80]!r})", "type")
    return value


class ChatCompletionRequest(GenerationFields):
    """The body of ``POST /v1/chat/completions``."""

    unsupported: ClassVar[Unsupported] = {**UNSUPPORTED, "echo": (False,)}

    messages: Annotated[list[ChatMessage], BeforeValidator(_without_unseen_pictures)] = Field(
        min_length=1, max_length=10_000, description="The conversation."
    )
    max_completion_tokens: Annotated[int | None, NoLimit] = Field(
        default=None, ge=1, le=1 << 31, description="Newer name of max_tokens."
    )
    logprobs: bool = Field(
        default=False, description="Tell each token's log-probability.", json_schema_extra=honoured("logprobs")
    )
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS, description="And of this many others; needs logprobs.")
    response_format: ResponseFormat | None = Field(
        default=None, description="What the reply is to look like.", json_schema_extra=honoured("grammar")
    )
    tools: list[Annotated[ToolDefinition | VendorTool, BeforeValidator(_tool)]] = Field(
        default=[], max_length=MAX_TOOLS, description="What the model may call; other types are left out."
    )
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_by_type)] = Field(
        default="auto",
        description="With 'required' or a name, the reply is a call that follows its schema.",
        json_schema_extra=honoured("grammar"),
    )
    parallel_tool_calls: bool = Field(default=True, description="Whether one reply may call several times.")
    reasoning_effort: Effort | None = Field(
        default=None, description="How much to reason, where the model does; max is xhigh."
    )
    chat_template_kwargs: Annotated[dict[str, JsonValue], BeforeValidator(few)] = Field(
        default={}, description="Variables for the chat template, such as enable_thinking."
    )
    continue_final_message: bool = Field(default=False, description="Go on with the last message, the assistant's.")
    add_generation_prompt: bool | None = Field(
        default=None, description="Has no effect but what continue_final_message says: true without it, false with it."
    )

    @property
    def constraints(self) -> list[Constraint]:
        found = [self.response_format.constraint] if self.response_format is not None else []
        return [each for each in found if each is not None] + super().constraints

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid("differs from max_tokens; give one of the two", "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise invalid("only allowed where logprobs is true", "top_logprobs")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise invalid("the last message is not the assistant's", "continue_final_message")
        if self.add_generation_prompt == self.continue_final_message:
            other = f"where continue_final_message is {to_json(self.continue_final_message).decode()}"
            raise invalid(
                f"must be {to_json(not self.continue_final_message).decode()} {other}", "add_generation_prompt"
            )
        return self

    @model_validator(mode="after")
    def _a_choice_of_tools(self) -> "ChatCompletionRequest":
        names = [tool.function.name for tool in self.functions]
        if len(set(names)) < len(names):
            raise invalid("two tools have the same name", "tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            known = ", ".join(names) or "none"
            raise invalid(f"there is no such tool; given are {known}", "tool_choice.function.name")
        if self.tool_choice == "required" and not names:
            raise invalid("there are no tools to choose from", "tool_choice")
        if self.choice not in ("auto", "none"):
            if other := super().constraints:
                raise invalid(f"not accepted together with {other[0].param}", "tool_choice")
            if self.constraints:
                self.note("response_format", "has no effect, because tool_choice demands a call")
        return self

    @property
    def functions(self) -> list[ToolDefinition]:
        """The tools that the model is told of."""
        return [tool for tool in self.tools if isinstance(tool, ToolDefinition)]

    @property
    def choice(self) -> ToolChoice:
        """What is to be called, in no dialect."""
        if isinstance(self.tool_choice, NamedTool):
            return NamedChoice(self.tool_choice.function.name)
        return self.tool_choice
