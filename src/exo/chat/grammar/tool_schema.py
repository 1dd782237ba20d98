"""The tools of a request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

LONGEST_NAME = 256
"""Characters. No tool has a longer name."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON Schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, JsonValue]

    @property
    def schema(self) -> dict[str, JsonValue]:
        """The JSON Schema of the arguments. Its type is always "object"."""
        return {**self.parameters, "type": "object"}

    def definition(self) -> dict[str, JsonValue]:
        """Returns the tool in OpenAI's form, which published chat templates read."""
        function: dict[str, JsonValue] = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class NamedChoice:
    """The model must call the tool of this name."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedChoice
