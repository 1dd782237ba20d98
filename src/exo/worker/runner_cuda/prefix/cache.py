"""The prefix cache: prefixes in the slots, busy or free, states in RAM, and files.

Layers with a sliding window or a recurrent state forget: a slot's cells alone then allow only some of its prefixes.
Others need a checkpoint of these layers; the cells of the remaining layers are in the slot.
"""

import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Tokens
from typing import Literal

from exo.worker.protocol.events import PrefixUse
from exo.worker.runner_common.sequence import common_prefix
from exo.worker.runner_cuda.prefix.cells import Cells
from exo.worker.runner_cuda.prefix.disk_tier import DiskTier, FileReading
from exo.worker.runner_cuda.prefix.divergence import Divergences
from exo.worker.runner_cuda.prefix.host_tier import Checkpoint, HostTier, Saved, Usable, packed
from exo.worker.runner_cuda.prefix.moved_cells import MovedCells
from exo.worker.runner_cuda.prefix.radix_tree import BLOCK, PrefixTree
from exo.worker.runner_cuda.prefix.search import CachedPrefix, Holder, PrefixSearch, Reach
from exo.worker.runner_cuda.prefix.state import State
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.slot import Slot

WORTH_COPYING = 1 / 512
"""The share of a slot's size by which a found prefix must exceed the slot's own to be worth a copy, which copies all
cells. Computing a token takes about a thousand times as long as copying a cell, on CPUs and GPUs alike."""
WORTH_SAVING = 256
"""A slot's state is saved before it is overwritten if at least this many of its tokens are cached nowhere else."""
SHARE_WORTH_SAVING = 1 / 16
"""The same as a share of the slot's tokens. All of them are saved, which delays the next request's first token; an
agent that drops its last turn's reasoning never comes back to the few that are lost."""
WORTH_MARKING = 32
"""A checkpoint is kept if it is at least this many tokens after the one before it."""

Place = Literal["slot", "ram", "disk"]


class PrefixCache:
    """Knows the tokens of all slots and saved states, and moves cells between them. Used by the engine's thread.

    Invariants: the tree has the tokens of each saved state, and those that each slot has computed or will compute, in
    whole blocks. A slot's ``cached`` are the tokens with cells. A sequence starts at a length only if the slot's cells
    allow it, as ``Cells.least`` says.
    """

    def __init__(
        self, cells: Cells, capacity: int, disk: DiskTier | None = None, moved: MovedCells | None = None
    ) -> None:
        """``capacity`` is the RAM for saved states and checkpoints, in bytes; 0 keeps none.

        With ``moved``, cells are also used at other positions.
        """
        self._cells = cells
        self._moved = moved
        self._host = HostTier(capacity, self._untree)
        self._disk = disk
        self._tree: PrefixTree[Holder] = PrefixTree()
        self._search = PrefixSearch(cells, self._host, self._tree)
        self._copying = False  # a copy or a wipe is due with the next decode
        self._divergences = Divergences()
        self._copied = 0  # bytes of the slot's copy that is being written to disk
        self._reading: FileReading | None = None
        self._fresh: set[Saved] = set()  # read from disk and not used yet
        self._hits: Counter[Place] = Counter()
        self._n_prompts = self._n_reused = 0

    @property
    def n_bytes(self) -> int:
        """The RAM that saved states and checkpoints take."""
        return self._host.n_bytes

    @property
    def can_cut(self) -> bool:
        """Whether the last tokens can be removed from a slot without a checkpoint."""
        return self._cells.can_cut

    @property
    def takes_checkpoints(self) -> bool:
        """Whether ``checkpoint`` has an effect."""
        return self._cells.forgets and self._host.capacity > 0

    def use(self) -> PrefixUse:
        """Returns what prompts have found so far. Safe in any thread."""
        hits = self._hits
        return PrefixUse(
            prompts=self._n_prompts,
            from_slots=hits["slot"],
            from_ram=hits["ram"],
            from_disk=hits["disk"],
            tokens=self._n_reused,
            ram_bytes=self._host.n_bytes,
            disk_bytes=self._disk.n_bytes if self._disk is not None else 0,
            diverged_at=self._divergences.last,
        )

    def find(self, sequence: Sequence) -> CachedPrefix | None:
        """See ``PrefixSearch.longest``."""
        return self._search.longest(sequence)

    def new_divergence(self, sequence: Sequence, found: CachedPrefix | None) -> int | None:
        """Returns where a prompt departs from a cached one whose rest it mostly repeats, which is computed again.

        Each place is returned once, since it is the same in every request of a client. ``found`` is the usable prefix.
        """
        if not sequence.reads_cache:
            return None
        cached = [holder.tokens for holder in self._tree.holders() if holder.adapter == sequence.adapter]
        return self._divergences.new(sequence.tokens, cached, found.length if found is not None else 0)

    def needs_decode(self, found: CachedPrefix) -> bool:
        """Whether the prefix can be used only after a decode.

        A pending copy takes effect with the next decode. It would overwrite a state restored before it, or copy that
        state instead of the source's cells.
        """
        return self._copying and (isinstance(found.holder, Saved) or found.checkpoint is not None)

    def enter(self, slot: Slot, sequence: Sequence, found: CachedPrefix | None) -> int:
        """Gives a free slot to a sequence, with the found prefix in it. Returns the number of cached tokens.

        ``sequence.moves`` are further cached tokens, which ``attach`` puts into the slot.
        """
        reach: Reach = 0, None
        if sequence.reads_cache:
            usable = () if self._copying else self._host.usable(sequence.tokens, sequence.adapter)
            same = slot.cached if slot.adapter == sequence.adapter else []
            own = min(common_prefix(same, sequence.tokens), len(sequence.tokens) - 1)
            own = sequence.uncut(min(own, slot.exact) if sequence.exact else own)
            reach = self._search.reach(slot, own, usable)
        n_found = max(reach[0], found.length if found is not None else 0)
        entered = self._enter_moved(slot, sequence, n_found)
        length, place = entered if entered is not None else self._enter_prefix(slot, reach, found)
        n_reused = length + sum(move.length for move in sequence.moves)
        self._n_prompts += 1
        self._n_reused += n_reused
        self._hits[place] += n_reused > 0
        del slot.cached[length:]
        self._tree.cut(slot, length)
        if length <= slot.exact:
            slot.exact = sys.maxsize
        slot.sequence, slot.adapter = sequence, sequence.adapter
        self.promise(slot)
        return length

    def attach(self, slot: Slot, sequence: Sequence) -> int:
        """Puts cells that are aside into the slot, if they come next. Returns the number of the slot's tokens."""
        if self._moved is not None:
            self._moved.attach(slot, sequence)
        return len(slot.cached)

    def release(self, slot: Slot) -> None:
        """Empties a free slot, and saves its state as before it is overwritten."""
        self._keep(slot, 0)
        self._empty(slot)

    def move_to_ram(self, slot: Slot) -> None:
        """Empties a free slot if its tokens are cached in another place, or if RAM can be spared for its state."""
        usable = self._host.usable(slot.cached, slot.adapter)
        if len(slot.cached) - self._search.held_elsewhere(slot, usable) >= BLOCK:
            spare = self._host.spare()
            saved = self._saved(slot, self._cells.save(slot.id, spare))
            if not saved.state.size or saved.n_bytes > spare:
                return
            self._store(saved, usable)
        self._empty(slot)

    def park(self, slot: Slot, sequence: Sequence) -> None:
        """Empties a sequence's slot, and keeps the state with the sequence if the RAM for prefixes has room for it."""
        state = self._cells.save(slot.id, self._host.room_for_copies())
        if state.size:
            self._host.lend(state.nbytes)
            sequence.parked = self._saved(slot, state)
        self._empty(slot)

    def unpark(self, sequence: Sequence) -> None:
        """Drops the state that ``park`` has kept with a sequence, if any."""
        if sequence.parked is not None:
            self._host.take_back(sequence.parked.state.nbytes)
            sequence.parked = None

    def resume(self, slot: Slot, sequence: Sequence) -> int:
        """Gives a free slot and its parked state to a sequence. Returns the number of its tokens with cells."""
        parked = sequence.parked
        assert parked is not None
        self.release(slot)
        if self._cells.restore(slot.id, parked.state):
            slot.cached[:], slot.exact = parked.cached, parked.exact
        self.unpark(sequence)
        slot.sequence, slot.adapter = sequence, sequence.adapter
        self.promise(slot)
        return len(slot.cached)

    def promise(self, slot: Slot) -> None:
        """Records all known tokens of the slot's sequence, so that other requests can wait for them."""
        self._tree.put(slot, slot.tokens, slot.adapter)

    def drop_after(self, slot: Slot, length: int) -> None:
        """Drops the slot's cells from index ``length`` on, and records the sequence's tokens.

        ``length`` must be within the slot's last step: windows reach back from there, and so does the rollback of a
        recurrent state.
        """
        assert not self._cells.can_cut or length >= self._cells.least(slot.id)
        trimmed = self._cells.trim(slot.id, length)
        assert trimmed
        self.promise(slot)

    def leave(self, slot: Slot) -> None:
        """Records that the slot's sequence leaves it: only computed tokens are cached, nothing is promised."""
        if self._moved is not None and slot.sequence is not None:
            self._moved.drop(slot.sequence)
        self._tree.cut(slot, len(slot.cached))

    def checkpoint(self, slot: Slot) -> None:
        """Keeps a checkpoint of the slot's tokens, unless there is one that saves nearly as many."""
        tokens = slot.cached
        if not self.takes_checkpoints:
            return
        before = max((each.most for each in self._host.usable(tokens, slot.adapter)), default=0)
        if len(tokens) - before < WORTH_MARKING:
            return
        state = self._cells.snapshot(slot.id, self._host.capacity)
        if state.size:
            least = self._cells.least_saved(len(tokens))
            self._host.add(Checkpoint(packed(tokens), least, state, slot.adapter))

    def wipe(self, spoilt: Collection[Slot], sound: Slot | None) -> None:
        """Empties free slots, and overwrites their cells with those of ``sound``, or with zeros if that is None.

        Emptying alone is not enough: a masked cell still spoils a computation if it is NaN.
        """
        for slot in spoilt:
            self._host.forget(slot.cached, slot.adapter)
            self._tree.cut(slot, 0)
            slot.cached.clear()
            self._cells.wipe(slot.id, None if sound is None else sound.id)
            self._copying = sound is not None

    def awaits_disk(self, sequence: Sequence) -> bool:
        """Whether a request should wait until a file is in RAM. Begins to read the file if none is being read."""
        disk = self._disk
        if disk is None or not sequence.reads_cache:
            return False
        self._settle_disk()
        if not sequence.looked:
            sequence.looked = True
            length, stored = disk.longest(sequence.tokens[:-1], sequence.adapter, self._host.capacity)
            found = self.find(sequence) if stored is not None else None
            if stored is not None and disk.is_worth(stored, length - (found.promised if found is not None else 0)):
                sequence.stored = stored
        if (stored := sequence.stored) is None:
            return False
        if self._reading is None and sequence.reading is None:
            self._host.make_room(stored.n_bytes)
            self._host.lend(stored.n_bytes)
            self._reading = disk.read(stored)
        if self._reading is not None and self._reading.stored is stored:
            sequence.reading = self._reading
        return sequence.reading in (None, self._reading)

    def write_one(self, slots: Iterable[Slot], *, last: bool = False) -> bool:
        """Has one prefix written to disk that has grown since it was. Returns whether there may be another one.

        States in RAM come first: they make room for the copy of a slot. ``last``: even if it has grown little.
        """
        disk = self._disk
        if disk is None:
            return False
        self._settle_disk()
        if disk.is_writing:
            return True
        for holder in (*reversed(list(self._host.saved())), *slots):
            if self._is_due(holder, last=last) and (saved := self._copy_of(holder)) is not None:
                self._write(saved)
                return True
        return self._reading is not None and not last

    def write_all(self, slots: Iterable[Slot], seconds: float) -> None:
        """Writes the prefixes that are not on disk yet, for at most ``seconds``."""
        until = time.monotonic() + seconds
        while self._disk is not None and self._disk.wait(until) and self.write_one(slots, last=True):
            pass

    def decoded(self) -> None:
        """Records a decode, with which pending copies have taken effect."""
        self._copying = False

    def _empty(self, slot: Slot) -> None:
        self._tree.cut(slot, 0)
        slot.cached.clear()
        slot.exact = sys.maxsize
        self._cells.trim(slot.id, 0)

    def _enter_moved(self, slot: Slot, sequence: Sequence, n_found: int) -> tuple[int, Place] | None:
        """Fills a slot with the tokens of a prompt that are cached at other positions.

        Returns the length of the prefix in the slot, and where it was found. None if no cells are moved, because a
        prefix of ``n_found`` tokens is nearly as good.
        """
        if self._moved is None or self._copying:
            return None
        found = self._moved.find(sequence, (slot, *self._host.saved()), n_found)
        if found is None:
            return None
        place: Place = "slot" if isinstance(found.holder, Slot) else "ram"
        if place == "slot":
            self._keep(slot, found.n_tokens)
        else:
            self._fetch(slot, CachedPrefix(found.holder, found.n_tokens, found.n_tokens))
        if not slot.cached:
            return 0, place
        self._divergences.last = None
        self._moved.set_aside(slot, sequence, found)
        return found.length, place

    def _enter_prefix(self, slot: Slot, reach: Reach, found: CachedPrefix | None) -> tuple[int, Place]:
        """Cuts a slot to its own prefix, or to the found one if that is much longer. Returns as ``_enter_moved``."""
        place: Place = "slot"
        worth = max(BLOCK, int(self._cells.n_ctx * WORTH_COPYING))
        if found is None or found.holder is slot or found.length < reach[0] + worth:
            self._keep(slot, reach[0])
        else:
            if isinstance(found.holder, Saved):
                place = "disk" if found.holder in self._fresh else "ram"
                self._fresh.discard(found.holder)
            reach = self._fetch(slot, found)
        return self._cut(slot, *reach), place

    def _cut(self, slot: Slot, length: int, checkpoint: Checkpoint | None) -> int:
        """Cuts a slot's cells to ``length``, or to none if that fails. Returns the number of tokens left."""
        if checkpoint is not None:
            self._host.used(checkpoint)
            if not self._cells.rewind(slot.id, checkpoint.state):
                return 0
        if length >= self._cells.least(slot.id) and self._cells.trim(slot.id, length):
            return length
        self._cells.trim(slot.id, 0)
        return 0

    def _fetch(self, slot: Slot, found: CachedPrefix) -> Reach:
        """Replaces the slot's cells with the found ones. Returns the prefix to which they are to be cut."""
        source = found.holder
        if isinstance(source, Saved):
            if len(source.cached) - found.length < _worth_saving(source.cached):
                self._host.drop(source)
            else:
                self._host.used(source)
        self._keep(slot, 0)
        self._tree.cut(slot, 0)
        if isinstance(source, Slot) and found.checkpoint is None:
            self._cells.copy(source.id, slot.id)
            self._copying = True
        elif not self._cells.restore(slot.id, self._state(source)):
            slot.cached.clear()
            return 0, None
        slot.cached[:] = source.cached
        slot.exact = source.exact
        return found.length, found.checkpoint

    def _state(self, source: Holder) -> State:
        """Returns a holder's cells. Those of a slot take room of the host tier for a moment."""
        if isinstance(source, Saved):
            return source.state
        state = self._cells.save(source.id, self._host.capacity)
        self._host.make_room(state.nbytes)
        return state

    def _keep(self, slot: Slot, n_kept: int) -> None:
        """Saves the slot's state if many of its tokens are neither among the ``n_kept`` first nor cached elsewhere."""
        usable = self._host.usable(slot.cached, slot.adapter)
        n_safe = max(n_kept, self._search.held_elsewhere(slot, usable))
        if self._host.capacity == 0 or len(slot.cached) - n_safe < _worth_saving(slot.cached):
            return
        state = self._cells.save(slot.id, self._host.capacity)
        if state.size:
            self._store(self._saved(slot, state), usable)

    def _store(self, saved: Saved, usable: Tokens[Usable]) -> None:
        """Keeps a saved state in RAM, and has it written to disk if it is due there and nothing else is written."""
        self._put(saved, usable)
        if self._disk is not None and not self._disk.is_writing and self._is_due(saved):
            self._write(saved)

    def _saved(self, slot: Slot, state: State) -> Saved:
        least = self._cells.least_saved(len(slot.cached)) if self._cells.forgets else 0
        return Saved(slot.cached.copy(), least, state, slot.exact, slot.adapter)

    def _put(self, saved: Saved, usable: Tokens[Usable]) -> None:
        """Keeps a saved state in RAM instead of those of its prefixes."""
        alike = [each for each in self._host.saved() if each.adapter == saved.adapter]
        for other in [each for each in alike if each.cached == saved.cached[: len(each.cached)]]:
            if self._search.reach(saved, len(other.cached), usable)[0] == len(other.cached):
                self._host.drop(other)
        if self._host.add(saved):
            self._tree.put(saved, saved.cached, saved.adapter)

    def _settle_disk(self) -> None:
        """Frees a copy that has been written, and puts the content of a file that has been read into RAM."""
        if self._copied and self._disk is not None and not self._disk.is_writing:
            self._host.take_back(self._copied)
            self._copied = 0
        if self._reading is None or not self._reading.is_over():
            return
        self._host.take_back(self._reading.stored.n_bytes)
        content, self._reading = self._reading.content(), None
        if content is None:
            return
        saved, checkpoints = content
        known = {len(each.checkpoint.tokens) for each in self._host.usable(saved.cached, saved.adapter)}
        for each in checkpoints:
            if len(each.tokens) not in known:
                self._host.add(each)
        self._put(saved, self._host.usable(saved.cached, saved.adapter))
        self._fresh.add(saved)

    def _is_due(self, holder: Holder, *, last: bool = False) -> bool:
        """Whether a holder should be written to disk. Shifted cells never are, since replayed requests read files."""
        exact = holder.exact >= len(holder.cached)
        return exact and self._disk is not None and self._disk.is_due(holder.cached, holder.adapter, last=last)

    def _copy_of(self, holder: Holder) -> Saved | None:
        """Returns the state to write; None if there is no RAM for a copy of a slot."""
        if isinstance(holder, Saved):
            return holder
        state = self._cells.save(holder.id, self._host.room_for_copies())
        if not state.size:
            return None
        self._host.lend(state.nbytes)
        self._copied = state.nbytes
        return self._saved(holder, state)

    def _write(self, saved: Saved) -> None:
        """Has a saved state written to disk, with the last checkpoints that take no more than it does."""
        assert self._disk is not None
        most = min(saved.state.nbytes, self._host.capacity - saved.n_bytes)
        self._disk.write(saved, self._host.checkpoints(saved, most))

    def _untree(self, saved: Saved) -> None:
        self._tree.cut(saved, 0)
        self._fresh.discard(saved)


def _worth_saving(tokens: Tokens[int]) -> float:
    """Returns how many of a state's tokens must be cached nowhere else for the state to be worth keeping."""
    return max(WORTH_SAVING, len(tokens) * SHARE_WORTH_SAVING)
