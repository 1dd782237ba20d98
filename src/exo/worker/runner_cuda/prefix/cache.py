"""The prefix cache: prefixes in the slots, busy or free, and states saved to RAM before a slot is overwritten."""

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
"""The share of a slot's size by which a found prefix must exceed the slot's own to be worth a copy, which copies all
cells. Computing a token takes about a thousand times as long as copying a cell, on CPUs and GPUs alike."""
WORTH_SAVING = 256
"""A slot's state is saved before it is overwritten if at least this many of its tokens are cached nowhere else."""
WORTH_WAITING = 64
"""A request waits for another slot's prefill if that is about to compute at least this many tokens of its prompt."""


class Cells(Protocol):
    """The cells of the slots' KV caches, which ``bindings.Context`` owns."""

    @property
    def n_ctx(self) -> int:
        """The number of cells of one slot."""
        ...

    @property
    def keeps_window(self) -> bool:
        """Whether a saved state has, in some layers, only the cells that the next token sees: it cannot be cut then."""
        ...

    def trim(self, slot: int, length: int) -> bool:
        """Keeps the first ``length`` cells of a slot. Returns false if the model's cache cannot be cut there."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copies all cells of one slot to another. It takes effect with the next decode, before that computes."""
        ...

    def wipe(self, slot: int, sound: int | None) -> None:
        """Empties a slot and overwrites its cells with those of the slot ``sound``, with the next decode.

        If ``sound`` is None, all slots are emptied and overwritten with zeros at once.
        """
        ...

    def save(self, slot: int, most: int) -> State:
        """Returns the cells of a slot; an empty array if that failed or they take more than ``most`` bytes."""
        ...

    def restore(self, slot: int, state: State) -> bool:
        """Replaces a slot's cells with saved ones. On failure, returns false and leaves the slot empty."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A slot's saved state. Prefixes of it with fewer than ``least`` tokens cannot be used."""

    cached: list[int]
    least: int
    state: State

    @property
    def tokens(self) -> list[int]:
        """The same as ``cached``, for what ``Slot`` and ``Saved`` have in common."""
        return self.cached

    @property
    def n_bytes(self) -> int:
        """RAM taken. A token in the list takes a pointer and an integer object."""
        return self.state.nbytes + 40 * len(self.cached)


@dataclass(frozen=True, slots=True)
class Found:
    """A cached prefix: ``length`` tokens now, ``promised`` once the holder's sequence is computed."""

    holder: Slot | Saved
    length: int
    promised: int


class PrefixCache:
    """Knows the tokens of all slots and saved states, and moves cells between them. Used by the engine's thread.

    Invariants: the tree has the tokens of each saved state, and those that each slot has computed or will compute, in
    whole blocks. A slot's ``cached`` are the tokens with cells. Saved states take at most ``capacity`` bytes.
    """

    def __init__(self, cells: Cells, capacity: int) -> None:
        """``capacity`` is the RAM for saved states, in bytes; 0 saves none."""
        self.n_bytes = 0
        self._cells = cells
        self._capacity = capacity
        self._tree: PrefixTree[Slot | Saved] = PrefixTree()
        self._saved: dict[Saved, None] = {}  # least recently used first
        self._copying = False  # a copy or a wipe is due with the next decode

    def find(self, sequence: Sequence) -> Found | None:
        """Returns the longest prefix of a sequence that is cached or about to be, of at least one block.

        The last token is always computed, because the first new token is sampled from its logits. With prompt
        log-probabilities, every token is computed, so nothing is looked up.
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
        """Whether the request should wait for the sequence that is computing the rest of the prefix."""
        return found.promised - found.length >= WORTH_WAITING

    def needs_decode(self, found: Found) -> bool:
        """Whether the prefix can be used only after a decode.

        A pending copy takes effect with the next decode. It would overwrite a state restored before it, or copy that
        state instead of the source's cells.
        """
        return self._copying and isinstance(found.holder, Saved)

    def enter(self, slot: Slot, sequence: Sequence, found: Found | None) -> int:
        """Gives a free slot to a sequence, with the found prefix in it. Returns the number of cached tokens."""
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
        """Records all known tokens of the slot's sequence, so that other requests can wait for them."""
        self._tree.put(slot, slot.tokens)

    def drop_after(self, slot: Slot, length: int) -> None:
        """Drops the slot's cells from index ``length`` on, and records the sequence's tokens."""
        self._cells.trim(slot.id, length)
        self.promise(slot)

    def leave(self, slot: Slot) -> None:
        """Records that the sequence has left the slot: only computed tokens are cached, nothing is promised."""
        self._tree.cut(slot, len(slot.cached))

    def wipe(self, spoilt: Collection[Slot], sound: Slot | None) -> None:
        """Empties free slots, and overwrites their cells with those of ``sound``, or with zeros if that is None.

        Emptying alone is not enough: a masked cell still spoils a computation if it is NaN.
        """
        for slot in spoilt:
            self._tree.cut(slot, 0)
            slot.cached.clear()
            slot.least = 0
            self._cells.wipe(slot.id, None if sound is None else sound.id)
            self._copying = sound is not None

    def decoded(self) -> None:
        """Records a decode, with which pending copies have taken effect."""
        self._copying = False

    def _fetch(self, slot: Slot, found: Found) -> int:
        """Replaces the slot's cells with the found ones. Returns the number of usable tokens."""
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
        """Saves the slot's state if many of its tokens are neither among the ``n_kept`` first nor cached elsewhere."""
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
        """Returns how many leading tokens of the slot are cached in another place, in whole blocks."""
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
