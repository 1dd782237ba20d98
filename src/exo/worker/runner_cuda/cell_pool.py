"""The cells of a KV cache that all slots share: how many are free, and how many a request finds taken by others."""

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.prefix.cells import Cells
from exo.worker.runner_cuda.prefix.state import State

IDLE_STEPS_ON_GPU = 128
"""See ``CellPool``. Moving a cell to RAM and back takes as long as reading it in about 200 steps: PCI Express has 10 to
25 GB/s, and a GPU's memory about 1 TB/s. On a CPU it is 0."""
_PROMPT_TOKENS = 8
"""The tokens of a prompt that count as one decode step. A row of a prompt is computed faster than a step of one row."""
Numbers = npt.NDArray[np.int32]


class CellPool:
    """Passes the prefix cache's operations on to the context's cells, and counts them as llama.cpp does.

    Each cell in use has a number of its own, which is not its place in llama.cpp's memory. A copied prefix shares its
    cells with the original. Invariants: ``_held[slot][i]`` is the cell of the slot's i-th token; a cell is free if no
    slot has it.
    """

    def __init__(self, context: Cells, n_slots: int, idle_steps: int = 0) -> None:
        """``idle_steps``: the decode steps of others after which the cells of a free slot should move to RAM."""
        self._context = context
        self._idle_steps = idle_steps
        self.n_ctx = context.n_ctx
        self.can_cut, self.forgets = context.can_cut, context.forgets
        self._held = [array("i") for _ in range(n_slots)]
        self._uses = np.zeros(self.n_ctx, np.int32)  # the number of slots that have a cell
        self._free = array("i", reversed(range(self.n_ctx)))

    @property
    def n_free(self) -> int:
        """The number of free cells."""
        return len(self._free)

    def should_move(self, n_idle: int, n_tokens: int) -> bool:
        """Whether the cells of a free slot should move to RAM before ``n_tokens`` of a prompt are computed.

        Attention goes through all cells in use, whosever they are. ``n_idle`` decode steps have done so for nothing.
        """
        return n_idle + n_tokens // _PROMPT_TOKENS >= self._idle_steps

    def room_beside(self, slots: Iterable[int], shared: int | None = None, length: int = 0) -> int:
        """Returns how many cells a sequence may have while ``slots`` keep theirs and every other slot is empty.

        Cells that it shares with them, out of the first ``length`` of the slot ``shared``, count for it alone.
        """
        taken = np.zeros(self.n_ctx, np.bool_)
        for slot in slots:
            taken[self._numbers(slot)] = True
        own = 0 if shared is None else int(taken[self._numbers(shared)[:length]].sum())
        return self.n_ctx - int(taken.sum()) + own

    def add(self, slot: int, count: int) -> None:
        """Counts the cells of ``count`` tokens that have been computed in a slot."""
        added = self._free[len(self._free) - count :]
        assert len(added) == count
        del self._free[len(self._free) - count :]
        self._held[slot].extend(added)
        self._uses[np.frombuffer(added, np.int32)] = 1

    def least(self, slot: int) -> int:
        """See ``Cells``, as for the methods below."""
        return self._context.least(slot)

    def length(self, slot: int) -> int:
        return len(self._held[slot])

    def least_saved(self, length: int) -> int:
        return self._context.least_saved(length)

    def trim(self, slot: int, length: int) -> bool:
        if not self._context.trim(slot, length):
            return False
        self._cut(slot, length)
        return True

    def copy(self, source: int, target: int) -> None:
        self._context.copy(source, target)
        self._cut(target, 0)
        self._held[target] = self._held[source][:]
        self._uses[self._numbers(target)] += 1

    def wipe(self, slot: int, sound: int | None) -> None:
        """Empties all slots, and overwrites their cells with zeros."""
        self._context.wipe(slot, None)
        for each in range(len(self._held)):
            self._cut(each, 0)

    def save(self, slot: int, most: int) -> State:
        return self._context.save(slot, most)

    def restore(self, slot: int, state: State) -> bool:
        self._cut(slot, 0)
        if not self._context.restore(slot, state):
            return False
        self.add(slot, self._context.length(slot))
        return True

    def snapshot(self, slot: int, most: int) -> State:
        return self._context.snapshot(slot, most)

    def rewind(self, slot: int, state: State) -> bool:
        return self._context.rewind(slot, state)

    def _numbers(self, slot: int) -> Numbers:
        """Returns a view of the slot's cells. It must be gone before their number changes."""
        return np.frombuffer(self._held[slot], np.int32) if self._held[slot] else np.empty(0, np.int32)

    def _cut(self, slot: int, length: int) -> None:
        dropped = self._held[slot][length:]
        if not dropped:
            return
        del self._held[slot][length:]
        numbers = np.frombuffer(dropped, np.int32)
        self._uses[numbers] -= 1
        self._free.frombytes(numbers[self._uses[numbers] == 0].tobytes())
