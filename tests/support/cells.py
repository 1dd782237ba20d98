"""Cells that hold token ids, so that tests see the contents of each slot. Copies wait for a decode, as in llama.cpp."""

from collections.abc import Sequence as Moves
from dataclasses import dataclass, field

import numpy as np

from exo.worker.runner_cuda.prefix.moved import Move
from exo.worker.runner_cuda.prefix.state import State
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.step import Step

MISSING = -1
"""A cell that a layer with a sliding window has lost."""
PENDING = -3
"""A cell that a copy is due to fill."""
NAN = -2
"""A cell that spoils every computation in its slot."""


@dataclass(slots=True)
class RecordedCells:
    """Implements ``prefix.cells.MovableCells``.

    ``window`` is the number of tokens that half of the layers see, the last one included; None is all. These layers
    lose every cell that no token after a step sees, except the last ``spare`` ones.
    """

    n_slots: int
    n_ctx: int = 1 << 12
    window: int | None = None
    can_cut: bool = True
    """False: half of the layers have a recurrent state."""
    spare: int = 0
    held: list[list[int]] = field(init=False)
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Source and target of all copies."""
    aside: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """Tokens that wait for a place in the slot, by position."""
    restored: int = 0
    rewound: int = 0
    _contents: list[list[int]] = field(init=False)
    _recent: list[list[int]] = field(init=False)
    """Half of the layers: the tokens of the cells, ``MISSING`` for lost ones."""
    _pending: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def __post_init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.held = [[] for _ in range(self.n_slots)]
        self._contents = [[] for _ in range(self.n_slots)]
        self._recent = [[] for _ in range(self.n_slots)]

    @property
    def forgets(self) -> bool:
        return self.window is not None or not self.can_cut

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def least(self, slot: int) -> int:
        if not self.can_cut:
            return len(self._recent[slot])
        lost = self._recent[slot].count(MISSING)
        return lost + self.window - 1 if self.window is not None and lost else 0

    def least_saved(self, length: int) -> int:
        return length - 1 if self.can_cut else length

    def trim(self, slot: int, length: int) -> bool:
        if not self.can_cut and 0 < length < len(self._recent[slot]):
            return False
        del self.held[slot][length:]
        del self._recent[slot][length:]
        return True

    def copy(self, source: int, target: int) -> None:
        self.copies.append((source, target))
        self._pending.append((source, target))
        self.held[target] = [PENDING] * len(self.held[source])
        self._recent[target] = [each if each == MISSING else PENDING for each in self._recent[source]]

    def spoil(self, slot: int) -> None:
        """Does what a failed computation does to a slot."""
        self._contents[slot] = [NAN] * self.n_ctx

    def wipe(self, slot: int, sound: int | None) -> None:
        if sound is None:
            self._clear()
        else:
            self.copy(sound, slot)
            self.held[slot].clear()
            self._recent[slot].clear()

    def save(self, slot: int, most: int) -> State:
        return self._state([self.held[slot], self._last(slot)], most)

    def restore(self, slot: int, state: State) -> bool:
        if not state.size:
            return self.trim(slot, 0) and False
        self.restored += 1
        self.held[slot], self._recent[slot] = state.view(np.int32).reshape(2, -1).tolist()
        self._contents[slot] = self.held[slot].copy()
        return True

    def snapshot(self, slot: int, most: int) -> State:
        return self._state([self._last(slot)], most)

    def rewind(self, slot: int, state: State) -> bool:
        assert not any(slot in pair for pair in self._pending)
        self.rewound += 1
        self._recent[slot] = state.view(np.int32).tolist()
        return True

    def set_aside(self, slot: int, length: int, moves: Moves[Move]) -> None:
        assert not self.aside
        for move in moves:
            self.aside[move.target] = self.held[slot][move.source : move.source + move.length]
        self.trim(slot, length)

    def attach(self, slot: int, move: Move) -> None:
        assert len(self.held[slot]) == move.target
        cells = self.aside.pop(move.target)
        assert len(cells) == move.length
        self.held[slot] += cells
        self._recent[slot] += cells

    def drop_aside(self) -> None:
        self.aside.clear()

    def _last(self, slot: int) -> list[int]:
        """The tokens that the last one saw, or all those that a recurrent state comes from."""
        recent = self._recent[slot]
        kept = len(recent) if self.window is None else min(self.window, len(recent))
        return [MISSING] * (len(recent) - kept) + recent[len(recent) - kept :]

    def _state(self, tokens: list[list[int]], most: int) -> State:
        assert not any(PENDING in each for each in tokens)
        state = np.array(tokens, np.int32).ravel().view(np.uint8)
        return state if state.nbytes <= most else np.empty(0, np.uint8)

    def decode(self, step: Step) -> None:
        """Makes the pending copies, then writes the step's cells. The cells that a cell needs must precede it."""
        for source, target in self._pending:
            self._contents[target] = self._contents[source].copy()
        for _, target in self._pending:  # a slot that was overwritten twice is as long as its last copy
            self.held[target] = self._contents[target][: len(self.held[target])]
            pairs = zip(self._recent[target], self._contents[target], strict=False)
            self._recent[target] = [old if old == MISSING else new for old, new in pairs]
        self._pending.clear()
        assert all(NAN not in self._contents[chunk.sequence.slot] for chunk in step.chunks)
        for chunk in step.chunks:
            assert chunk.sequence.adapter == step.adapter
            slot, tokens = chunk.sequence.slot, _computed(chunk.sequence)
            known = tokens[: chunk.start]
            seen = chunk.start if self.window is None else min(chunk.start, self.window - 1)
            assert self.held[slot] == known
            assert len(self._recent[slot]) == chunk.start
            assert self._recent[slot][chunk.start - seen :] == known[chunk.start - seen :]
            new = tokens[chunk.start : chunk.stop] + chunk.draft
            self.held[slot] += new
            self._contents[slot] = self.held[slot].copy()
            recent = self._recent[slot] + new
            lost = 0 if self.window is None else max(0, chunk.start - self.window + 1 - self.spare)
            self._recent[slot] = [MISSING] * lost + recent[lost:]


def _computed(sequence: Sequence) -> list[int]:
    """The tokens of a sequence as its cells hold them. Those computed with different adapters differ."""
    offset = sum(sequence.adapter.encode()) << 20
    return [token + offset for token in sequence.tokens] if offset else sequence.tokens
