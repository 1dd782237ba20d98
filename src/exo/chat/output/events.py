"""The parts of a parsed reply."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call begins. ``index`` counts the calls of the reply from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call ``index``. The texts of a complete call concatenate to one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """Call ``index`` ends incomplete: its arguments do not concatenate to a JSON object.

    With ``cut_off``, the reply was cut off inside the call. Otherwise the text is not a valid call, and follows as
    content.
    """

    index: int
    cut_off: bool


Part = Content | Reasoning | ToolCall | Arguments | BrokenCall
