"""States in RAM: those of slots before they were overwritten, and checkpoints of layers that forget."""

import sys
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.prefix.state import State

Packed = npt.NDArray[np.int32]

_CANDIDATES = 8
"""The number of least recently used states among which the cheapest one to compute again is dropped first."""


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """The cells of a whole slot. Prefixes of it with fewer than ``least`` tokens need a checkpoint."""

    cached: list[int]
    least: int
    state: State
    exact: int = sys.maxsize
    """See ``Slot``, also for the next one."""
    adapter: str = ""

    @property
    def tokens(self) -> list[int]:
        """The same as ``cached``, for what ``Slot`` and ``Saved`` have in common."""
        return self.cached

    @property
    def n_bytes(self) -> int:
        """RAM taken. A token in the list takes a pointer and an integer object."""
        return self.state.nbytes + 40 * len(self.cached)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The state, after some tokens, of the layers that keep only a window of cells or a recurrent state.

    With it, a slot whose other layers have the cells of the same tokens can be cut to ``least`` to ``length`` tokens.
    """

    tokens: Packed
    least: int
    state: State
    adapter: str = ""

    @property
    def n_bytes(self) -> int:
        """RAM taken."""
        return self.state.nbytes + self.tokens.nbytes


@dataclass(frozen=True, slots=True)
class Usable:
    """A checkpoint that allows to cut cells of certain tokens to ``least`` to ``most`` of them."""

    least: int
    most: int
    checkpoint: Checkpoint


def packed(tokens: Tokens[int]) -> Packed:
    """Returns tokens in a form that is compared fast."""
    return np.frombuffer(array("i", tokens), np.int32)


class HostTier:
    """Saved slots and checkpoints of at most ``capacity`` bytes together.

    Room is made by dropping, among the least recently used ones, the one whose loss costs the fewest tokens. A long
    prefix therefore outlasts many short ones that are used once.
    """

    def __init__(self, capacity: int, dropped: Callable[[Saved], None]) -> None:
        """``dropped`` is called with each saved slot that is dropped."""
        self.capacity = capacity
        self._dropped = dropped
        self.n_bytes = 0
        self.lent = 0  # the part of ``n_bytes`` for states on their way to or from the disk
        self._kept: dict[Saved | Checkpoint, None] = {}  # least recently used first

    def saved(self) -> Iterator[Saved]:
        """Yields the saved slots, least recently used first."""
        return (each for each in self._kept if isinstance(each, Saved))

    def usable(self, tokens: Tokens[int], adapter: str = "") -> list[Usable]:
        """Returns the checkpoints of prefixes of ``tokens`` that were computed with an adapter, or without one."""
        checkpoints = [each for each in self._kept if isinstance(each, Checkpoint) and each.adapter == adapter]
        if not checkpoints:
            return []
        wanted = packed(tokens)
        found = (Usable(each.least, common_length(each.tokens, wanted), each) for each in checkpoints)
        return [each for each in found if each.most >= each.least]

    def checkpoints(self, saved: Saved, most: int) -> list[Checkpoint]:
        """Returns the longest checkpoints of whole prefixes of a state that take at most ``most`` bytes together."""
        usable = self.usable(saved.cached, saved.adapter)
        found = [each.checkpoint for each in usable if each.most == len(each.checkpoint.tokens)]
        chosen: list[Checkpoint] = []
        for each in sorted(found, key=lambda each: len(each.tokens), reverse=True):
            if (most := most - each.n_bytes) < 0:
                break
            chosen.append(each)
        return chosen

    def add(self, entry: Saved | Checkpoint) -> bool:
        """Keeps an entry as the one used last. Returns false if it is too large."""
        if entry.n_bytes > self.capacity:
            return False
        self.make_room(entry.n_bytes)
        self._kept[entry] = None
        self.n_bytes += entry.n_bytes
        return True

    def make_room(self, n_bytes: int) -> None:
        """Drops entries until ``n_bytes`` fit beside the others."""
        while self._kept and self.n_bytes + n_bytes > self.capacity:
            oldest = list(islice(self._kept, max(1, min(_CANDIDATES, len(self._kept) // 2))))
            self.drop(min(oldest, key=self._cost))

    def room_for_copies(self) -> int:
        """Returns the bytes that a copy may take: all but those of checkpoints, which the slots need."""
        kept = sum(each.n_bytes for each in self._kept if isinstance(each, Checkpoint))
        return max(0, self.capacity - self.lent - kept)

    def spare(self) -> int:
        """Returns the bytes of a state for which nothing is dropped that is worth more than a fast decode step.

        Many small states are enough to choose from. A large one may be all that a conversation has left.
        """
        free = self.capacity - self.n_bytes
        many = sum(1 for _ in self.saved()) >= _CANDIDATES
        return max(free, self.capacity // _CANDIDATES if many else 0)

    def lend(self, n_bytes: int) -> None:
        """Counts ``n_bytes`` for a copy, for which saved slots are dropped, oldest first."""
        for each in list(self.saved()):
            if self.n_bytes + n_bytes <= self.capacity:
                break
            self.drop(each)
        self.n_bytes += n_bytes
        self.lent += n_bytes

    def take_back(self, n_bytes: int) -> None:
        """Ends what ``lend`` has begun."""
        self.n_bytes -= n_bytes
        self.lent -= n_bytes

    def used(self, entry: Saved | Checkpoint) -> None:
        """Makes an entry the one used last."""
        if entry in self._kept:
            del self._kept[entry]
            self._kept[entry] = None

    def drop(self, entry: Saved | Checkpoint) -> None:
        """Frees an entry, if it is there."""
        if entry in self._kept:
            del self._kept[entry]
            self.n_bytes -= entry.n_bytes
            if isinstance(entry, Saved):
                self._dropped(entry)

    def forget(self, tokens: Tokens[int], adapter: str) -> None:
        """Drops the checkpoints of all prefixes of ``tokens``."""
        for each in self.usable(tokens, adapter):
            self.drop(each.checkpoint)

    def _cost(self, entry: Saved | Checkpoint) -> int:
        """Returns the number of tokens that would have to be computed again without the entry."""
        if isinstance(entry, Saved):
            return len(entry.cached)
        length = len(entry.tokens)
        kept = (each for each in self._kept if isinstance(each, Checkpoint) and each.adapter == entry.adapter)
        others = [each.tokens for each in kept if len(each.tokens) < length]
        return length - max((len(each) for each in others if common_length(each, entry.tokens) == len(each)), default=0)


def common_length(first: Packed, second: Packed) -> int:
    """Returns the length of the common prefix."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length
