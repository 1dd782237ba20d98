"""Cells that hold token ids, so that tests see the contents of each slot. Copies wait for a decode, as in llama.cpp."""

from dataclasses import dataclass, field

import numpy as np

from exo.worker.runner_cuda.prefix.cache import State
from exo.worker.runner_cuda.scheduler import Step

MISSING = -1
"""A cell that was not part of a saved state."""
NAN = -2
"""A cell that spoils every computation in its slot."""


@dataclass(slots=True)
class RecordedCells:
    """Implements ``prefix.cache.Cells``. ``window`` is the number of cells in a saved state; None is all."""

    n_slots: int
    n_ctx: int = 1 << 12
    window: int | None = None
    cuts: bool = True
    """Whether cells can be cut anywhere."""
    held: list[list[int]] = field(init=False)
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Source and target of all copies."""
    restored: int = 0
    _contents: list[list[int]] = field(init=False)
    _pending: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def __post_init__(self) -> None:
        self.held = [[] for _ in range(self.n_slots)]
        self._contents = [[] for _ in range(self.n_slots)]

    @property
    def keeps_window(self) -> bool:
        return self.window is not None

    def trim(self, slot: int, length: int) -> bool:
        if not self.cuts and 0 < length < len(self.held[slot]):
            return False
        del self.held[slot][length:]
        return True

    def copy(self, source: int, target: int) -> None:
        self.copies.append((source, target))
        self._pending.append((source, target))
        self.held[target] = [MISSING] * len(self.held[source])

    def spoil(self, slot: int) -> None:
        """Does what a failed computation does to a slot."""
        self._contents[slot] = [NAN] * self.n_ctx

    def wipe(self, slot: int, sound: int | None) -> None:
        if sound is None:
            self.held = [[] for _ in range(self.n_slots)]
            self._contents = [[] for _ in range(self.n_slots)]
        else:
            self.copy(sound, slot)
            self.trim(slot, 0)

    def save(self, slot: int, most: int) -> State:
        cells = self.held[slot]
        assert MISSING not in cells[-(self.window or len(cells)) :]
        kept = [MISSING] * (len(cells) - (self.window or len(cells))) + cells[-(self.window or len(cells)) :]
        state = np.array(kept, np.int32).view(np.uint8)
        return state if state.nbytes <= most else np.empty(0, np.uint8)

    def restore(self, slot: int, state: State) -> bool:
        self.restored += 1
        self.held[slot] = state.view(np.int32).tolist()
        self._contents[slot] = self.held[slot].copy()
        return True

    def decode(self, step: Step) -> None:
        """Makes the pending copies, then writes the step's cells. The cells that a cell needs must precede it."""
        for source, target in self._pending:
            self._contents[target] = self._contents[source].copy()
        for _, target in self._pending:  # a slot that was overwritten twice is as long as its last copy
            self.held[target] = self._contents[target][: len(self.held[target])]
        self._pending.clear()
        assert all(NAN not in self._contents[chunk.sequence.slot] for chunk in step.chunks)
        for chunk in step.chunks:
            cells, tokens = self.held[chunk.sequence.slot], chunk.sequence.tokens
            seen = min(chunk.start, self.window or chunk.start)
            assert len(cells) == chunk.start
            assert cells[chunk.start - seen :] == tokens[chunk.start - seen : chunk.start]
            cells += tokens[chunk.start : chunk.stop] + chunk.draft
            self._contents[chunk.sequence.slot] = cells.copy()
