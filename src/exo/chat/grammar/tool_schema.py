"""The functions that a request lets the model call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. ``parameters`` is the JSON Schema of its arguments, an object."""

    name: str
    description: str
    parameters: Mapping[str, JsonValue]
    strict: bool = False
    """Whether the client insists that arguments follow the schema."""

    @property
    def schema(self) -> dict[str, JsonValue]:
        """The JSON Schema of the arguments, which are an object whatever ``parameters`` says."""
        return {**self.parameters, "type": "object"}

    def definition(self) -> dict[str, JsonValue]:
        """The tool as OpenAI writes it, which is also what published chat templates read."""
        function: dict[str, JsonValue] = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class NamedChoice:
    """The reply must be a call of this one tool."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedChoice
"""Whether the model may, must not or must call a tool."""
