"""The messages from rank 0 to the other ranks, one JSON object a line. The second one is the protocol's ``Load``."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from exo.worker.protocol.commands import Load
from exo.worker.protocol.messages import Message


class Meet(Message):
    """The first message: the number of the rank, and the addresses with ports of all ranks."""

    type: Literal["meet"] = "meet"
    rank: int
    places: tuple[str, ...]


class Pass(Message):
    """One forward pass over the slots' cache: the arguments of ``MlxModel.forward``, except the tokens."""

    type: Literal["pass"] = "pass"
    slots: list[int]
    starts: list[int]
    width: int
    whole: bool


class TextPass(Message):
    """One forward pass without the head, over the cache of one text to embed. A pass from 0 begins a new text."""

    type: Literal["text_pass"] = "text_pass"
    start: int
    width: int
    cells: int
    """The number of tokens of the text."""


class Clear(Message):
    """The arguments of ``KVCache.clear``, for the slots' cache."""

    type: Literal["clear"] = "clear"
    slot: int
    start: int
    stop: int


Plan = Annotated[Meet | Load | Pass | TextPass | Clear, Field(discriminator="type")]

PLANS: TypeAdapter[Plan] = TypeAdapter(Plan)
