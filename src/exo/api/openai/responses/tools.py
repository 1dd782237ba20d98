"""Tools of a responses request: functions, functions in namespaces, and custom tools, all told as functions.

A model knows functions with JSON arguments only. A function of a namespace is told under a name that joins both, a
custom tool as a function with one text argument; calls are given back under the client's own names and types.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue
from pydantic_core import from_json, to_json

from exo.api.http.body import RequestBody, Unsupported, invalid, unsupported
from exo.api.openai.chat_request import FunctionDefinition, ToolName, VendorTool, vendor_tool
from exo.chat.grammar.tool_schema import Tool

_INPUT = "input"
"""The argument that holds a custom tool's text."""


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    ignored: ClassVar[Unsupported] = {"defer_loading": (False,)}

    type: Literal["function"] = Field(description="A function.")
    strict: bool = Field(default=True, description="Arguments that a call is forced into always follow the schema.")


class CustomFormat(RequestBody):
    """What the input of a custom tool looks like."""

    type: Literal["text", "grammar"] = Field(default="text", description="Any text, or text that follows a grammar.")
    syntax: str = Field(default="", max_length=32, description="Of the grammar; the model is told it.")
    definition: str = Field(
        default="", description="The grammar; the model is told it, and not held to it, as x-exo-warning says."
    )


class CustomTool(RequestBody):
    """A tool whose input is text. The model is told of a function with one argument, ``input``."""

    type: Literal["custom"] = Field(description="A custom tool.")
    name: ToolName = Field(description="What the model calls it by.")
    description: str = Field(default="", description="What it does, for the model.")
    format: CustomFormat = Field(default=CustomFormat(), description="What its input looks like.")

    def tool(self) -> Tool:
        """The same in no dialect."""
        rules = f"The input follows this {self.format.syntax} grammar:\n{self.format.definition}"
        texts = [self.description, rules if self.format.definition else ""]
        text: dict[str, JsonValue] = {"type": "string", "description": "The whole input of the tool, as plain text."}
        parameters: dict[str, JsonValue] = {
            "type": "object",
            "properties": {_INPUT: text},
            "required": [_INPUT],
            "additionalProperties": False,
        }
        return Tool(self.name, "\n\n".join(filter(None, texts)), parameters)


def _callable(value: JsonValue) -> FunctionTool | CustomTool | VendorTool:
    """By its type, since a union would explain what is wrong with each of its members."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "custom":
        return CustomTool.model_validate(value)
    if isinstance(kind, str) and kind != "function":
        return vendor_tool(kind, "tools")
    return FunctionTool.model_validate(value)


class NamespaceTool(RequestBody):
    """Functions that belong together, such as those of an MCP server."""

    type: Literal["namespace"] = Field(description="A namespace.")
    name: ToolName = Field(description="Stands before the names of the tools that the model is told.")
    description: JsonValue = Field(default=None, description="Has no effect.")
    tools: list[Annotated[FunctionTool | CustomTool | VendorTool, BeforeValidator(_callable)]] = Field(
        default=[], max_length=4096, description="What the model may call."
    )


ResponsesTool = FunctionTool | CustomTool | NamespaceTool | VendorTool


def _tool(value: JsonValue) -> ResponsesTool:
    is_namespace = isinstance(value, dict) and value.get("type") == "namespace"
    return NamespaceTool.model_validate(value) if is_namespace else _callable(value)


ResponsesTools = list[Annotated[ResponsesTool, BeforeValidator(_tool)]]


class NamedResponsesTool(RequestBody):
    """Demands a call of this tool."""

    type: Literal["function", "custom"] = Field(description="Of the tool.")
    name: str = Field(description="Of a tool among the tools.")
    namespace: str | None = Field(default=None, description="Of the tool, where it has one.")

    @property
    def told_name(self) -> str:
        """What the model calls the tool by."""
        return told_name(self.namespace, self.name)

    @property
    def told_names(self) -> list[str]:
        """The same, as ``AllowedTools`` has it."""
        return [self.told_name]


class AllowedTool(RequestBody):
    """One of the tools."""

    type: Literal["function", "custom"] = Field(default="function", description="Of the tool.")
    name: str = Field(description="Of a tool among the tools.")
    namespace: str | None = Field(default=None, description="Of the tool, where it has one.")


class AllowedTools(RequestBody):
    """The tools that this reply may call, of all that are given."""

    type: Literal["allowed_tools"] = Field(description="Some of the tools.")
    mode: Literal["auto", "required"] = Field(default="auto", description="Whether one of them has to be called.")
    tools: list[AllowedTool] = Field(min_length=1, max_length=4096, description="Which ones.")

    @property
    def told_names(self) -> list[str]:
        """What the model calls them by."""
        return [told_name(tool.namespace, tool.name) for tool in self.tools]


ResponsesChoice = Literal["none", "auto", "required"] | NamedResponsesTool | AllowedTools


def by_type(value: JsonValue) -> JsonValue | NamedResponsesTool | AllowedTools:
    """A choice of tools, refused here, since a union would explain what is wrong with each of its types."""
    kind = value.get("type") if isinstance(value, dict) else value
    if kind in ("none", "auto", "required"):
        return kind
    if not isinstance(value, dict):
        raise invalid('must be \'none\', \'auto\', \'required\' or {"type": "function", "name": "…"}')
    if kind == "allowed_tools":
        return AllowedTools.model_validate(value)
    if kind not in ("function", "custom"):
        raise unsupported(f"only functions and custom tools can be called (got {str(kind)[:80]!r})", "type")
    return NamedResponsesTool.model_validate(value)


def told_name(namespace: str | None, name: str) -> str:
    """What the model calls a tool by."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as the model is told of it, and as its client knows it."""

    tool: Tool
    name: str
    namespace: str | None = None
    custom: bool = False
    has_grammar: bool = False
    """Whether a custom tool's input has to follow a grammar, of which the model is only told."""


def offered(tools: Sequence[ResponsesTool]) -> Iterator[OfferedTool]:
    """Every tool, those of namespaces among them."""
    for each in tools:
        inside = each.tools if isinstance(each, NamespaceTool) else [each]
        namespace = each.name if isinstance(each, NamespaceTool) else None
        for one in inside:
            if isinstance(one, VendorTool):
                continue
            tool = one.tool()
            named = Tool(told_name(namespace, one.name), tool.description, tool.parameters)
            custom = isinstance(one, CustomTool)
            has_grammar = isinstance(one, CustomTool) and bool(one.format.definition)
            yield OfferedTool(named, one.name, namespace, custom, has_grammar)


def custom_arguments(text: str) -> str:
    """The arguments by which the model is told that a custom tool was called with ``text``."""
    return to_json({_INPUT: text}).decode()


def custom_input(arguments: str) -> str:
    """The text that a custom tool is called with; of arguments that were cut off, what there is of it."""
    try:
        found: JsonValue = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return arguments
    text = found.get(_INPUT) if isinstance(found, dict) else None
    return text if isinstance(text, str) else arguments
