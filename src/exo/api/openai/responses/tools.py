"""Tools of a responses request: functions, functions in namespaces, and custom tools. The model sees functions.

A model knows functions with JSON arguments only. A function of a namespace is told under a name that joins both, a
custom tool as a function with one text argument; calls are given back under the client's own names and types.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue
from pydantic_core import from_json, to_json

from exo.api.http.body import RequestBody, Unsupported, invalid, unsupported
from exo.api.openai.tools import FunctionDefinition, ToolName, VendorTool, vendor_tool
from exo.chat.grammar.tool_schema import Tool

_INPUT = "input"
"""The argument that holds a custom tool's text."""


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    ignored: ClassVar[Unsupported] = {"defer_loading": (False,)}

    type: Literal["function"] = Field(description="A function.")
    strict: bool = Field(default=True, description="Has no effect: a required call always follows the schema.")


class CustomFormat(RequestBody):
    """The format of a custom tool's input."""

    type: Literal["text", "grammar"] = Field(default="text", description="Any text, or text that follows a grammar.")
    syntax: str = Field(default="", max_length=32, description="The notation of the grammar. The model sees it.")
    definition: str = Field(
        default="", description="The grammar. The model sees it, but it is not enforced; x-exo-warning says so."
    )


class CustomTool(RequestBody):
    """A tool whose input is text. The model sees a function with one argument, ``input``."""

    type: Literal["custom"] = Field(description="A custom tool.")
    name: ToolName = Field(description="The name by which the model calls it.")
    description: str = Field(default="", description="A description for the model.")
    format: CustomFormat = Field(default=CustomFormat(), description="The format of its input.")

    def tool(self) -> Tool:
        """The tool in no API's form."""
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
    """Validates by type, because a union would report one error for each of its members."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "custom":
        return CustomTool.model_validate(value)
    if isinstance(kind, str) and kind != "function":
        return vendor_tool(kind, "tools")
    return FunctionTool.model_validate(value)


class NamespaceTool(RequestBody):
    """Functions that belong together, such as those of an MCP server."""

    type: Literal["namespace"] = Field(description="A namespace.")
    name: ToolName = Field(description="A prefix of the tools' names that the model sees.")
    description: JsonValue = Field(default=None, description="Has no effect.")
    tools: list[Annotated[FunctionTool | CustomTool | VendorTool, BeforeValidator(_callable)]] = Field(
        default=[], max_length=4096, description="The tools that the model may call."
    )


ResponsesTool = FunctionTool | CustomTool | NamespaceTool | VendorTool


def _tool(value: JsonValue) -> ResponsesTool:
    is_namespace = isinstance(value, dict) and value.get("type") == "namespace"
    return NamespaceTool.model_validate(value) if is_namespace else _callable(value)


ResponsesTools = list[Annotated[ResponsesTool, BeforeValidator(_tool)]]


class NamedResponsesTool(RequestBody):
    """Requires a call of this tool."""

    type: Literal["function", "custom"] = Field(description="The name of the tool.")
    name: str = Field(description="The name of one of the tools.")
    namespace: str | None = Field(default=None, description="The namespace of the tool, if it has one.")

    @property
    def told_name(self) -> str:
        """The name of the tool that the model sees."""
        return told_name(self.namespace, self.name)

    @property
    def told_names(self) -> list[str]:
        """The name in a list, as in ``AllowedTools``."""
        return [self.told_name]


class AllowedTool(RequestBody):
    """One of the tools."""

    type: Literal["function", "custom"] = Field(default="function", description="The name of the tool.")
    name: str = Field(description="The name of one of the tools.")
    namespace: str | None = Field(default=None, description="The namespace of the tool, if it has one.")


class AllowedTools(RequestBody):
    """The subset of the tools that this reply may call."""

    type: Literal["allowed_tools"] = Field(description="A subset of the tools.")
    mode: Literal["auto", "required"] = Field(default="auto", description="Whether a call is required.")
    tools: list[AllowedTool] = Field(min_length=1, max_length=4096, description="The tools.")

    @property
    def told_names(self) -> list[str]:
        """The names of the tools that the model sees."""
        return [told_name(tool.namespace, tool.name) for tool in self.tools]


ResponsesChoice = Literal["none", "auto", "required"] | NamedResponsesTool | AllowedTools


def by_type(value: JsonValue) -> JsonValue | NamedResponsesTool | AllowedTools:
    """Refuses wrong types of a choice here, because a union would report one error for each of its types."""
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
    """The name of a tool that the model sees."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as the model sees it and as the client knows it."""

    tool: Tool
    name: str
    namespace: str | None = None
    custom: bool = False
    has_grammar: bool = False
    """Whether a custom tool has a grammar for its input. The model sees it, but it is not enforced."""


def offered(tools: Sequence[ResponsesTool]) -> Iterator[OfferedTool]:
    """All tools, including those in namespaces."""
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
    """The arguments that show the model a call of a custom tool with ``text``."""
    return to_json({_INPUT: text}).decode()


def custom_input(arguments: str) -> str:
    """The text in the arguments of a custom tool, or its beginning if the arguments were cut off."""
    try:
        found: JsonValue = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return arguments
    text = found.get(_INPUT) if isinstance(found, dict) else None
    return text if isinstance(text, str) else arguments
