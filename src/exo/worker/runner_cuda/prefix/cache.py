"""Prefixes that need not be computed again: in any slot, busy or idle, and of slots given away in the host's memory."""

from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.prefix.radix_tree import BLOCK, PrefixTree
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.slot import Slot

State = npt.NDArray[np.uint8]

WORTH_COPYING = 1 / 512
"""Tokens, for each that a slot can hold, that make up for copying its cells, all of which are copied: computing a
token takes about a thousand times as long as copying one's cells, on CPUs and GPUs alike."""
WORTH_SAVING = 256
"""Tokens, found nowhere else, for which what is lost from a slot is kept in the host's memory."""
WORTH_WAITING = 64
"""Tokens that another slot is about to compute, for which a request does not compute them at the same time."""


class Cells(Protocol):
    """The context's cells. ``llama.Context`` has them."""

    @property
    def n_ctx(self) -> int:
        """How many a slot has."""
        ...

    @property
    def keeps_window(self) -> bool:
        """Whether a saved state has only what the next token needs, so that it is of use whole or not at all."""
        ...

    def trim(self, slot: int, length: int) -> bool:
        """Keeps the first ``length`` cells of a slot; false where they cannot be cut there."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Makes a slot's cells those of another; done with the next decode, before anything else."""
        ...

    def wipe(self, slot: int, sound: int | None) -> None:
        """Empties a slot and overwrites its cells with those of the slot ``sound``, as late as ``copy`` does.

        None: all slots are emptied and overwritten at once.
        """
        ...

    def save(self, slot: int, most: int) -> State:
        """The cells of a slot; empty if that failed or takes over ``most`` bytes."""
        ...

    def restore(self, slot: int, state: State) -> bool:
        """Makes a slot's cells those saved; false, and no cells, if that failed."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What a slot held; of use for at least its first ``least`` tokens."""

    cached: list[int]
    least: int
    state: State

    @property
    def tokens(self) -> list[int]:
        """As ``Slot.tokens``."""
        return self.cached

    @property
    def n_bytes(self) -> int:
        """Memory taken; a token takes a pointer and a number."""
        return self.state.nbytes + 40 * len(self.cached)


@dataclass(frozen=True, slots=True)
class Found:
    """Where the first ``length`` tokens of a prompt are, and how many are there once what is known is computed."""

    holder: Slot | Saved
    length: int
    promised: int


class PrefixCache:
    """Knows what all slots hold and moves cells between them. For the engine's thread only, as the cells are."""

    def __init__(self, cells: Cells, capacity: int) -> None:
        """``capacity`` bytes of the host's memory for what slots no longer hold."""
        self.n_bytes = 0
        self._cells = cells
        self._capacity = capacity
        self._tree: PrefixTree[Slot | Saved] = PrefixTree()
        self._saved: dict[Saved, None] = {}
        """Least recently used first."""
        self._copying = False

    def find(self, sequence: Sequence) -> Found | None:
        """The longest prefix of a sequence that anyone holds or is about to compute, of at least one block.

        The last token is left out, since its logits are what the first choice is made from; and all are where the
        prompt's log-probabilities are asked for.
        """
        if sequence.prompt_logprobs is not None:
            return None
        tokens = sequence.tokens
        for depth, holders in self._tree.matches(tokens):
            found = [_found(holder, tokens, depth) for holder in holders]
            best = max(found, key=lambda each: (each.promised, each.length, isinstance(each.holder, Slot)))
            if best.promised:
                return best
        return None

    def is_awaited(self, found: Found) -> bool:
        """Whether a request does better to wait a step, until another has computed what both need."""
        return found.promised - found.length >= WORTH_WAITING

    def needs_decode(self, found: Found) -> bool:
        """Whether what was found can be used only after a decode.

        A copy is made with the next decode; a state restored before it would be overwritten, or copied instead.
        """
        return self._copying and isinstance(found.holder, Saved)

    def enter(self, slot: Slot, sequence: Sequence, found: Found | None) -> int:
        """Gives a free slot to a sequence, whose first tokens it then holds as far as anyone has; how many they are."""
        length = 0
        if sequence.prompt_logprobs is None:
            length = _usable(slot, min(slot.common_prefix(sequence.tokens), len(sequence.tokens) - 1))
        worth = max(BLOCK, int(self._cells.n_ctx * WORTH_COPYING))
        if found is None or found.holder is slot or found.length < length + worth:
            self._keep(slot, length)
        else:
            length = self._fetch(slot, found)
        if not self._cells.trim(slot.id, length):
            self._cells.trim(slot.id, 0)
            length = 0
        del slot.cached[length:]
        if length == 0:
            slot.least = 0
        self._tree.cut(slot, length)
        slot.sequence = sequence
        self.promise(slot)
        return length

    def promise(self, slot: Slot) -> None:
        """Notes all tokens known of the sequence in a slot, computed or not."""
        self._tree.put(slot, slot.tokens)

    def drop_after(self, slot: Slot, length: int) -> None:
        """Drops the cells that a slot has beyond ``length`` tokens, which are all that it knows of."""
        self._cells.trim(slot.id, length)
        self.promise(slot)

    def leave(self, slot: Slot) -> None:
        """Notes that the sequence has left the slot, which holds what was computed."""
        self._tree.cut(slot, len(slot.cached))

    def wipe(self, spoilt: Collection[Slot], sound: Slot | None) -> None:
        """Forgets what free slots hold, and overwrites it with the cells of ``sound``; None: no slot is.

        A masked cell still spoils a computation if it is NaN.
        """
        for slot in spoilt:
            self._tree.cut(slot, 0)
            slot.cached.clear()
            slot.least = 0
            self._cells.wipe(slot.id, None if sound is None else sound.id)
            self._copying = sound is not None

    def decoded(self) -> None:
        """Notes a decode, with which copies are made."""
        self._copying = False

    def _fetch(self, slot: Slot, found: Found) -> int:
        """Puts what was found in the place of what the slot holds; how many of the tokens are of use."""
        source = found.holder
        if isinstance(source, Saved):
            self._drop(source)
        self._keep(slot, 0)
        self._tree.cut(slot, 0)
        if isinstance(source, Slot):
            self._cells.copy(source.id, slot.id)
            self._copying = True
        elif not self._cells.restore(slot.id, source.state):
            slot.cached.clear()
            return 0
        slot.cached[:] = source.cached
        slot.least = source.least
        return found.length

    def _keep(self, slot: Slot, n_kept: int) -> None:
        """Saves what the slot holds, if much of it is in no other place, nor among the tokens that it keeps."""
        n_safe = max(n_kept, self._held_elsewhere(slot))
        if self._capacity == 0 or len(slot.cached) - n_safe < WORTH_SAVING:
            return
        state = self._cells.save(slot.id, self._capacity)
        least = len(slot.cached) if self._cells.keeps_window else slot.least
        saved = Saved(slot.cached.copy(), least, state)
        if not state.size or saved.n_bytes > self._capacity:
            return
        for other in [other for other in self._saved if other.cached == saved.cached[: len(other.cached)]]:
            if least <= len(other.cached):
                self._drop(other)
        while self.n_bytes + saved.n_bytes > self._capacity:
            self._drop(next(iter(self._saved)))
        self._saved[saved] = None
        self.n_bytes += saved.n_bytes
        self._tree.put(saved, saved.cached)

    def _held_elsewhere(self, slot: Slot) -> int:
        for depth, holders in self._tree.matches(slot.cached):
            if any(h is not slot and len(h.cached) >= depth >= h.least for h in holders):
                return depth
        return 0

    def _drop(self, saved: Saved) -> None:
        del self._saved[saved]
        self.n_bytes -= saved.n_bytes
        self._tree.cut(saved, 0)


def _found(holder: Slot | Saved, prompt: Tokens[int], depth: int) -> Found:
    promised = depth
    for mine, theirs in zip(holder.tokens[depth : depth + BLOCK], prompt[depth : depth + BLOCK], strict=False):
        if mine != theirs:
            break
        promised += 1
    promised = _usable(holder, min(promised, len(prompt) - 1))
    return Found(holder, _usable(holder, min(promised, len(holder.cached))), promised)


def _usable(holder: Slot | Saved, length: int) -> int:
    return length if length >= holder.least else 0
