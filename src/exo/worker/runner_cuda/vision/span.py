"""The places of pictures among the tokens of a sequence."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from exo.worker.runner_common.pictures import Png

Vectors = npt.NDArray[np.float32]
"""The input of the model in the place of tokens: (n_tokens, size of a token's vector)."""
Places = npt.NDArray[np.int32]
"""Positions in four dimensions: (4, n_tokens)."""
STILL = -(1 << 30)
"""Ids below it stand for tokens of a picture after which the position is the same as before."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPart:
    """A part of a picture as the model reads it."""

    vectors: Vectors
    places: Places | None
    """The places of its tokens, if the model gives pictures two dimensions."""


class SeenPicture:
    """A picture of a request. The encoder's thread writes ``parts`` or ``fault``, the engine's thread reads them."""

    def __init__(self, png: Png) -> None:
        self.png = png
        self.asked = False
        self.users = 0
        """Parts of it in sequences that are not done. Only the engine's thread changes it."""
        self.parts: list[EncodedPart] = []
        """Empty until it is encoded, and once all of them are computed."""
        self.fault = ""
        """Why it cannot be encoded, as a sentence that names it; empty if it can."""


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens ``start`` to ``stop`` of a sequence, which stand for a part of a picture.

    Their ids are negative and derived from the picture, so equal prompts have equal ids.
    """

    start: int
    stop: int
    picture: SeenPicture
    part: int
    positions: int
    """By how many positions the token behind it is further on than its first one."""
    whole: bool
    """Whether its tokens see each other, so that they are computed in one step."""

    @property
    def is_solid(self) -> bool:
        """Whether no cached prefix may end inside it."""
        return self.whole or self.positions != self.stop - self.start

    def moved(self, count: int) -> "Span":
        """The same ``count`` tokens later."""
        return replace(self, start=self.start + count, stop=self.stop + count)

    def vectors(self, start: int, stop: int) -> Vectors:
        """Returns the vectors of the sequence's tokens ``start`` to ``stop``."""
        return self.picture.parts[self.part].vectors[start - self.start : stop - self.start]

    def places(self, start: int, stop: int, position: int) -> Places | None:
        """Returns the places of these tokens if the span begins at ``position``; None without two dimensions."""
        places = self.picture.parts[self.part].places
        return None if places is None else places[:, start - self.start : stop - self.start] + position


def span_at(spans: Sequence[Span], index: int) -> Span | None:
    """Returns the span with the token ``index``, or else the next one."""
    at = bisect_right(spans, index, key=lambda span: span.stop)
    return spans[at] if at < len(spans) else None


def whole_length(spans: Sequence[Span], length: int) -> int:
    """Returns the most tokens, up to ``length``, that end in no solid span."""
    span = span_at(spans, length)
    return span.start if span is not None and span.is_solid and span.start < length else length


def position_of(spans: Sequence[Span], index: int) -> int:
    """Returns the position of a token of text, or of the first one of a span."""
    return index - sum(span.stop - span.start - span.positions for span in spans if span.stop <= index)


def n_still(tokens: Iterable[int]) -> int:
    """Returns how many of these ids stand for tokens after which the position is the same as before."""
    return sum(token < STILL for token in tokens)
