"""Tools in OpenAI's chat requests, and the choice between them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from exo.api.http.body import RequestBody, invalid, note, unsupported
from exo.chat.grammar.tool_schema import NamedChoice, Tool, ToolChoice

MAX_TOOLS = 4096
_CHOICES = ("none", "auto", "required")
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


def _of_an_object(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if schema.get("type", "object") != "object":
        raise invalid("must be 'object', which arguments always are", "type")
    return schema


Parameters = Annotated[dict[str, JsonValue], AfterValidator(_of_an_object)]
"""JSON Schema of a tool's arguments."""


class FunctionDefinition(RequestBody):
    """A function that the model may call."""

    name: ToolName = Field(description="The name by which the model calls it.")
    description: str = Field(default="", description="A description for the model.")
    parameters: Parameters = Field(
        default={"type": "object", "properties": {}}, description="JSON Schema of the arguments, an object."
    )
    strict: bool = Field(default=False, description="Has no effect: a required call always follows the schema.")

    def tool(self) -> Tool:
        """The tool in no API's form."""
        return Tool(self.name, self.description, self.parameters)


class ToolDefinition(RequestBody):
    """One tool."""

    type: Literal["function"] = Field(default="function", description="The only supported type.")
    function: FunctionDefinition = Field(description="The function.")


class NamedFunction(RequestBody):
    """The name of one of the tools."""

    name: str = Field(description="The name of one of the functions.")


class NamedTool(RequestBody):
    """Requires a call of this tool."""

    type: Literal["function"] = Field(description="The only supported type.")
    function: NamedFunction = Field(description="The function.")


class FunctionSubset(RequestBody):
    """Some of the tools."""

    mode: Literal["auto", "required"] = Field(default="auto", description="Whether a call is required.")
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS, description="The tools.")


class AllowedFunctions(RequestBody):
    """The subset of the tools that this reply may call."""

    type: Literal["allowed_tools"] = Field(description="A subset of the tools.")
    allowed_tools: FunctionSubset = Field(description="The tools.")

    @property
    def names(self) -> set[str]:
        """The tools' names."""
        return {tool.function.name for tool in self.allowed_tools.tools}


class VendorTool(RequestBody):
    """A tool that only its vendor can run. The model does not see it."""

    type: str = Field(description="Any other type.")


def vendor_tool(kind: str, field: str) -> VendorTool:
    """Makes one and adds a warning."""
    note(f"{field}.{kind[:64]}", "no tool of this type can be run here, and the model is not told of it")
    return VendorTool(type=kind)


def tool_by_type(value: JsonValue) -> ToolDefinition | VendorTool:
    """Validates by type, because a union would report one error for each of its members."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("function", "custom"):
        return vendor_tool(kind, "tools")
    return ToolDefinition.model_validate(value)


def check_tool_names(names: Sequence[str], choice: ToolChoice = "auto", name_field: str = "") -> None:
    """Raises an error for names that are not unique, and for a choice of a tool that is not there.

    ``name_field`` is the field of the chosen name.
    """
    if len(set(names)) < len(names):
        raise invalid("two tools have the same name", "tools")
    if isinstance(choice, NamedChoice) and choice.name not in names:
        raise invalid(f"there is no such tool; given are {', '.join(names) or 'none'}", name_field)
    if choice == "required" and not names:
        raise invalid("there are no tools to choose from", "tool_choice")


def choice_by_type(value: JsonValue) -> "JsonValue | AllowedFunctions":
    """Refuses wrong types here, because a union would report one error for each of its types."""
    if isinstance(value, dict) and value.get("type") in (*_CHOICES, "any"):
        value = value["type"]
    if value == "any":
        return "required"
    if value in _CHOICES:
        return value
    if not isinstance(value, dict):
        raise invalid('must be \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": "…"}}')
    if (kind := value.get("type")) == "allowed_tools":
        return AllowedFunctions.model_validate(value)
    if kind != "function":
        raise unsupported(f"only functions can be called (got {str(kind)[:80]!r})", "type")
    return value
