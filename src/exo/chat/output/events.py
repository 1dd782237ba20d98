"""What a model's reply is made of, once its text has been read: see ``exo.chat.output.registry``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """More of what the reader is to see."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call begins. ``index`` counts the calls of this reply from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of call ``index``. The texts of a whole call, put together, are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class BrokenCall:
    """Call ``index`` ends and is not whole: its arguments, put together, are no JSON object.

    With ``cut_off``, the reply was cut off inside the call. Otherwise the model wrote something that is no call, and
    the text of the call follows as content.
    """

    index: int
    cut_off: bool


Part = Content | Reasoning | ToolCall | Arguments | BrokenCall
