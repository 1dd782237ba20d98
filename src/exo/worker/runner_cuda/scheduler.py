"""Plans the next step from slots, sequences and token budgets. Pure: it does not call llama.cpp."""

from collections import Counter, deque
from collections.abc import Collection, Iterable
from itertools import islice

from exo.worker.runner_common.sequence import Phase, common_prefix
from exo.worker.runner_cuda.burst import Burst, is_late
from exo.worker.runner_cuda.cell_pool import CellPool
from exo.worker.runner_cuda.prefix.cache import PrefixCache
from exo.worker.runner_cuda.prefix.host_tier import Saved
from exo.worker.runner_cuda.prefix.search import CachedPrefix
from exo.worker.runner_cuda.prompt_cuts import MIN_CHUNK, checkpoint_marks, chunk_end, with_mark
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.slot import Slot
from exo.worker.runner_cuda.speculation.speculation import Speculation
from exo.worker.runner_cuda.step import Chunk, Step
from exo.worker.runner_cuda.step_time import Pace
from exo.worker.runner_cuda.vision.sight import Sight
from exo.worker.runner_cuda.vision.span import n_still, span_at

ALONE_SECONDS = 1.5
"""The longest prefill step while nothing decodes. A request that arrives during the step waits for its end."""


class Scheduler:
    """Owns the queue, the slots and the order in which prompts are prefilled.

    Decode steps and prefill steps alternate. Invariants:

    - Between two decode steps, prompts get at most ``budget`` tokens, and no more than ``pace`` allows without stalling
      the streams. One prompt gets at most ``chunk`` of them. A prefill step takes further prompts while it has fewer
      than ``enough`` tokens. The first streams of a ``Burst`` may wait longer for their second tokens, and its last
      prompts share a step.
    - The oldest prompt and the one with the fewest missing tokens come first in turn. A short prompt thus overtakes a
      long one, which still gets half of the time.
    - Prompts are cut as ``prompt_cuts`` says. A step has at most one chunk of a prompt with log-probabilities, because
      the context has room for its logits only.
    - Tokens of a picture are computed once it is encoded, in a step of their own. Meanwhile, other prompts and streams
      go on.
    - The sequences of a step have the same adapters. Each round of decode steps, between which no prompt is computed,
      has one for each combination of adapters.
    - Drafts, which ``speculation`` makes, are verified only while no prompt is being prefilled.
    - With a ``pool``, a sequence enters when its prompt and its longest output fit beside what the others have by then,
      and none overtakes one that does not fit. If cells run out, free slots give up theirs, then the sequence that came
      last goes back to the queue; its cells are kept in RAM.
      When a sequence enters, free slots with cells that it does not begin with give them up to RAM, as
      ``CellPool.should_move`` says.
    """

    def __init__(
        self,
        n_slots: int,
        budget: int,
        chunk: int,
        enough: int,
        pace: Pace,
        cache: PrefixCache,
        speculation: Speculation | None = None,
        alone: int | None = None,
        pool: CellPool | None = None,
        sight: Sight | None = None,
    ) -> None:
        """While no sequence decodes, a prompt's chunk has up to ``alone`` tokens, if ``ALONE_SECONDS`` suffice."""
        self.slots = [Slot(index) for index in range(n_slots)]
        self.waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []  # in order of arrival
        self._left = 0  # prompt tokens that may be computed before the next decode step
        self._served: set[str] = set()  # prompts that have had a chunk since the last decode step
        self._oldest_first = True
        self._round: list[str] = []  # the adapters whose streams are still to have a step in this round
        self._by_id: dict[str, Sequence] = {}
        self._budget = budget
        self._beside, self._alone = min(chunk, budget), min(alone or chunk, budget)
        self._chunk = self._alone  # the most tokens of one prompt in the next step
        self._least = min(MIN_CHUNK, self._beside)
        self._burst = Burst(pace, budget, self._beside)
        self._enough = min(enough, budget)
        self._pace = pace
        self._cache = cache
        self._pool = pool
        self._sight = sight
        self._decodes = 0  # decode steps so far
        self._speculation = speculation or Speculation("off")
        self._entered = 0

    @property
    def n_active(self) -> int:
        """The number of sequences in slots."""
        return len(self._by_id) - len(self.waiting)

    def __bool__(self) -> bool:
        return bool(self._by_id)

    def add(self, sequence: Sequence) -> None:
        """Appends a sequence to the queue."""
        self._by_id[sequence.id] = sequence
        for span in sequence.pictures:
            span.picture.users += 1
        self.waiting.append(sequence)

    def sequences(self) -> Iterable[Sequence]:
        """All sequences that are not done."""
        return tuple(self._by_id.values())

    def remove(self, sequence_id: str) -> Sequence | None:
        """Ends a sequence in any phase, and returns it; None if it is unknown. Its slot keeps the cached cells."""
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return None
        for span in sequence.pictures:
            span.picture.users -= 1
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
            self._cache.unpark(sequence)
        else:
            slot = self.slots[sequence.slot]
            self._cache.leave(slot)
            slot.sequence, slot.left = None, self._decodes
        if sequence.phase is Phase.PREFILL:
            self._prefilling.remove(sequence)
        sequence.move(Phase.DONE)
        return sequence

    def plan(self) -> Step:
        """Returns the next step, without chunks if there is nothing to compute."""
        diverged: list[tuple[str, int]] = []
        started = self._admit(diverged)
        due = [slot.sequence for slot in self.slots if slot.sequence is not None and slot.sequence.n_missing == 1]
        self._chunk = self._beside if due else self._pace.tokens_in(ALONE_SECONDS, self._beside, self._alone)
        if not due:
            self._burst.begin()
        missing = [sequence.n_missing for sequence in self._prefilling if sequence.n_missing > 1]
        waits = self._burst.waits(missing) and all(sequence.phase is Phase.DECODE for sequence in due)
        if waits or not due:
            self._left = self._budget
            self._served.clear()
        else:
            self._left = self._burst.left(self._left, self._prompt_tokens(due))
        self._round = [each for each in self._round if any(sequence.adapter == each for sequence in due)]
        chunks = [] if self._round else self._with_room(self._prefill_chunks(len(due), waits=waits))
        if chunks:
            n_rows = sum(chunk.n_rows for chunk in chunks)
            self._left -= n_rows
            if due:
                self._burst.prefilled(n_rows)
            self._served.update(chunk.sequence.id for chunk in chunks)
            return Step(chunks, started, prefills=True, diverged=diverged)
        due = [sequence for sequence in due if sequence.phase is not Phase.WAITING]
        self._left = self._prompt_tokens(due)
        if due:
            self._burst.end()
        due = self._next_of_round(due)
        drafts = [list[int]() for _ in due] if self._prefilling else self._speculation.drafts(due)
        chunks = [Chunk(s, s.n_computed, len(s.tokens), draft) for s, draft in zip(due, drafts, strict=True)]
        chunks = self._with_room(chunks)
        self._served.clear()
        return Step(chunks, started, prefills=False, diverged=diverged)

    def computed(self, step: Step, seconds: float) -> None:
        """Records that ``step`` is in the KV cache, and the time it took."""
        if step.prefills:
            self._pace.prefilled(step.n_rows, seconds)
        else:
            self._decodes += 1
            self._pace.decoded(step.n_rows, seconds)
            self._speculation.computed(step.n_rows, seconds)
        self._cache.decoded()
        for chunk in step.chunks:
            sequence, slot = chunk.sequence, self.slots[chunk.sequence.slot]
            sequence.n_computed = chunk.stop
            slot.cached += sequence.tokens[chunk.start : chunk.stop]
            if sequence.moves:
                sequence.n_computed = self._cache.attach(slot, sequence)
            if self._pool is not None:
                self._pool.add(slot.id, chunk.n_rows)
            self._cache.promise(slot)
            if chunk.samples and sequence.phase is Phase.PREFILL:
                self._prefilling.remove(sequence)
                sequence.move(Phase.DECODE)

    def take_checkpoints(self, step: Step) -> None:
        """Keeps the checkpoints that are due after ``step``. Call it when the step's tokens are on their way.

        They are due at a sequence's marks and at the end of its prompt: the next prompt often has another reply there.
        """
        for chunk in step.chunks if step.prefills else ():
            sequence, slot = chunk.sequence, self.slots[chunk.sequence.slot]
            if chunk.stop in (*sequence.marks, sequence.n_prefill) and len(slot.cached) == chunk.stop:
                self._cache.checkpoint(slot)

    def verified(self, chunk: Chunk) -> int:
        """Keeps the cells of the draft's correct guesses, once the sampled tokens are known, and drops the others.

        A sequence may be done by then: its slot keeps the cells for later prompts. Returns the number of these guesses.
        """
        sequence, slot = chunk.sequence, self.slots[chunk.sequence.slot]
        came = sequence.tokens[chunk.stop : chunk.stop + len(chunk.draft)]
        n_true = common_prefix(came, chunk.draft)
        self._speculation.verified(sequence, n_true, missed=n_true < len(came))
        sequence.n_computed = chunk.stop + n_true
        slot.cached += came[:n_true]
        self._cache.drop_after(slot, sequence.n_computed)
        return n_true

    def spoilt(self, sequences: Collection[Sequence]) -> Collection[Sequence]:
        """Overwrites cells that contain NaN or infinity, after a step that gave these sequences such logits.

        Returns the sequences that have failed, which have left their slots. In a pool, cells of one sequence spoil
        others, so all are computed again, each without others, and one fails if that gives such logits, too.
        """
        if self._pool is None:
            slots = [sequence.slot for sequence in sequences]
            for sequence in sequences:
                self.remove(sequence.id)
            sound = next((slot for slot in self.slots if slot.id not in slots), None)
            self._cache.wipe([self.slots[index] for index in slots], sound)
            return sequences
        failed = [sequence for sequence in sequences if sequence.alone]
        for sequence in failed:
            self.remove(sequence.id)
        for sequence in reversed(self._active()) if sequences else ():
            sequence.alone = True
            self._send_back(sequence)
        if sequences:
            self._cache.wipe(self.slots, None)
        return failed

    def position(self, slot: int, length: int) -> int:
        """Returns the position after a slot's first ``length`` cached tokens."""
        return length - n_still(self.slots[slot].cached[:length])

    def blind(self) -> list[tuple[str, str]]:
        """Ends the sequences in slots that have a picture which cannot be encoded. Returns them with the reason."""
        if self._sight is None:
            return []
        faults = [(s.id, span.picture.fault) for s in self._prefilling for span in s.pictures if span.picture.fault]
        return [(sequence, fault) for sequence, fault in faults if self.remove(sequence) is not None]

    def write_one(self) -> bool:
        """Has a prefix written to disk while nothing is computed. Returns whether there may be another one."""
        return self._cache.write_one(self._latest())

    def write_all(self, seconds: float) -> None:
        """Writes the prefixes that are not on disk yet, for at most ``seconds``."""
        self._cache.write_all(self._latest(), seconds)

    def _latest(self) -> list[Slot]:
        """The slots, the one used last first."""
        return sorted(self.slots, key=lambda slot: slot.entered, reverse=True)

    def recompute_last(self, sequence: Sequence) -> None:
        """Has the last known token of a sequence computed once more."""
        slot = self.slots[sequence.slot]
        sequence.n_computed = len(sequence.tokens) - 1
        del slot.cached[sequence.n_computed :]
        self._cache.drop_after(slot, sequence.n_computed)

    def _prompt_tokens(self, due: list[Sequence]) -> int:
        """Returns how many prompt tokens may be computed between two tokens of these streams."""
        rows = Counter(sequence.adapter for sequence in due)
        return self._pace.prompt_tokens(list(rows.values()), self._least, self._budget)

    def _next_of_round(self, due: list[Sequence]) -> list[Sequence]:
        """Returns the streams that have the next adapter of the round, the first one of a new round after the last."""
        self._round = self._round or list(dict.fromkeys(sequence.adapter for sequence in due))
        adapter = self._round.pop(0) if self._round else ""
        return [sequence for sequence in due if sequence.adapter == adapter]

    def _admit(self, diverged: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Moves waiting sequences to free slots, in order of arrival. Returns them with their cached tokens.

        Adds to ``diverged`` those of which ``Step.diverged`` tells.
        A sequence stays in the queue while another one is computing the prefix that both need, or a file is read.
        No other overtakes one for which the pool has no room.
        """
        started: list[tuple[str, int]] = []
        for sequence in tuple(islice(self.waiting, len(self.slots))):
            if self.n_active == len(self.slots):
                break
            if sequence.parked is None and self._cache.awaits_disk(sequence):
                continue
            found = self._cache.find(sequence)
            if found is not None and found.is_awaited:
                self._await(found)
                continue
            if found is not None and self._cache.needs_decode(found):
                if self.n_active:
                    continue
                found = None  # nothing else will be decoded, so waiting would never end
            if not self._has_room(sequence, found):
                break
            self._move_idle(sequence, found)
            slot = self._choose_slot(found)
            self._entered += 1
            slot.entered = self._entered
            self.waiting.remove(sequence)
            sequence.slot = slot.id
            if sequence.parked is not None:
                self._begin(sequence, self._cache.resume(slot, sequence))
                continue
            at = self._cache.new_divergence(sequence, found)
            n_cached = self._cache.enter(slot, sequence, found)
            if at is not None and not sequence.moves:
                diverged.append((sequence.id, at))
            if not sequence.n_told:
                started.append((sequence.id, n_cached + sum(move.length for move in sequence.moves)))
            self._begin(sequence, self._cache.attach(slot, sequence))
        return started

    def _begin(self, sequence: Sequence, n_cached: int) -> None:
        sequence.n_computed = n_cached
        sequence.marks = [move.target for move in sequence.moves]
        if not sequence.marks and self._cache.takes_checkpoints and sequence.prompt_logprobs is None:
            sequence.marks = checkpoint_marks(sequence, self._least, can_cut=self._cache.can_cut)
        sequence.move(Phase.PREFILL)
        self._prefilling.append(sequence)

    def _active(self) -> list[Sequence]:
        """The sequences in slots, in order of arrival."""
        return [sequence for sequence in self._by_id.values() if sequence.phase is not Phase.WAITING]

    def _has_room(self, sequence: Sequence, found: CachedPrefix | None) -> bool:
        """Whether the pool has room for a waiting sequence. Frees the cells that its saved state takes, if any."""
        pool, active = self._pool, self._active()
        if pool is None:
            return True
        if active and (sequence.alone or active[0].alone):
            return False
        holder = found.holder if found is not None else None
        state = sequence.parked or (holder if isinstance(holder, Saved) else None)
        wanted = max(sequence.n_wanted, len(state.cached) if state is not None else 0)
        shared = (holder.id, found.length) if found is not None and isinstance(holder, Slot) else (None, 0)
        missing = sum(each.n_missing for each in active)
        if wanted + missing > pool.room_beside((each.slot for each in active), *shared):
            return False
        while state is not None and len(state.cached) > pool.n_free and self._release_one():
            pass
        return True

    def _move_idle(self, sequence: Sequence, found: CachedPrefix | None) -> None:
        """Moves the cells of free slots to RAM before a sequence enters, except those that it begins with."""
        length, holder = (found.length, found.holder) if found is not None else (0, None)
        if self._pool is None:
            return
        for slot in self.slots:
            if slot.sequence is not None or not slot.cached or slot is holder:
                continue
            if self._pool.should_move(self._decodes - slot.left, len(sequence.tokens) - length):
                self._cache.move_to_ram(slot)

    def _with_room(self, chunks: list[Chunk]) -> list[Chunk]:
        """Makes room in the pool for the rows of chunks. Returns those whose sequences are still in their slots."""
        pool = self._pool
        while pool is not None and sum(chunk.n_rows for chunk in chunks) > pool.n_free:
            if self._release_one():
                continue
            if any(chunk.draft for chunk in chunks):
                chunks = [Chunk(chunk.sequence, chunk.start, chunk.stop) for chunk in chunks]
                continue
            youngest = self._active()[-1]
            self._cache.park(self.slots[youngest.slot], youngest)
            self._send_back(youngest)
            chunks = [chunk for chunk in chunks if chunk.sequence is not youngest]
        return chunks

    def _release_one(self) -> bool:
        """Gives up the cells of the free slot that was used the longest time ago. Returns false if none has any."""
        free = [slot for slot in self.slots if slot.sequence is None and slot.cached]
        if free:
            self._cache.release(min(free, key=lambda slot: slot.entered))
        return bool(free)

    def _send_back(self, sequence: Sequence) -> None:
        """Puts a sequence from its slot to the beginning of the queue."""
        self.slots[sequence.slot].sequence = None
        if sequence.phase is Phase.PREFILL:
            self._prefilling.remove(sequence)
        sequence.move(Phase.WAITING)
        sequence.n_computed, sequence.slot = 0, -1
        sequence.exact = sequence.exact or sequence.parked is None
        self.waiting.appendleft(sequence)

    def _await(self, found: CachedPrefix) -> None:
        """Has a sequence stop for a checkpoint at the end of the prefix that another one waits for."""
        sequence = found.holder.sequence if isinstance(found.holder, Slot) else None
        if sequence is not None and self._cache.takes_checkpoints:
            sequence.marks = with_mark(sequence, found.promised, self._least)

    def _choose_slot(self, found: CachedPrefix | None) -> Slot:
        """Returns a free slot with as many busy neighbours as possible: each gap splits every batch once more.

        Among equals, the slot with the found prefix is preferred, if the prefix is most of its content, then the slot
        that a sequence entered the longest time ago.
        """

        def busy(index: int) -> bool:
            return 0 <= index < len(self.slots) and self.slots[index].sequence is not None

        def cost(slot: Slot) -> tuple[int, bool, int]:
            stays = found is not None and found.holder is slot and 2 * found.length >= len(slot.cached)
            return -busy(slot.id - 1) - busy(slot.id + 1), not stays, slot.entered

        return min((slot for slot in self.slots if slot.sequence is None), key=cost)

    def _prefill_chunks(self, n_begun: int, *, waits: bool) -> list[Chunk]:
        """Returns chunks of the prompts in turn, within the tokens left.

        ``n_begun`` sequences have had a token. ``waits``: none of them decodes before the prompts are computed.
        """
        chunks: list[Chunk] = []
        n_rows, scored = 0, False
        prompts = self._in_turn()
        most = self._alone if waits and is_late(n_begun, len(prompts)) else self._enough
        for sequence in prompts:
            stop = chunk_end(sequence, self._left - n_rows, self._least, self._chunk)
            chunk = Chunk(sequence, sequence.n_computed, stop)
            is_picture = sequence.picture is not None
            if chunk.stop <= chunk.start or (scored and chunk.n_scored) or (is_picture and chunks):
                continue
            if chunks and sequence.adapter != chunks[0].sequence.adapter:
                continue
            if n_rows >= self._enough and n_rows + chunk.n_rows > most:
                continue
            n_rows += chunk.n_rows
            scored = scored or chunk.n_scored > 0
            chunks.append(chunk)
            if is_picture:
                break
        if chunks:
            self._oldest_first = not self._oldest_first
        # llama.cpp computes consecutive, ascending sequence ids together and cuts the batch anywhere else. Prompts of
        # ``enough`` tokens would gain little by that, and would be rounded otherwise, so each is computed by itself.
        apart = n_rows >= self._enough * len(chunks)
        return sorted(chunks, key=lambda chunk: chunk.sequence.slot, reverse=apart)

    def _sees(self, sight: Sight, sequence: Sequence) -> bool:
        """Whether a sequence's next tokens can be computed. Has its next picture encoded in any case."""
        span = span_at(sequence.pictures, sequence.n_computed)
        return span is None or sight.is_ready(span.picture) or sequence.n_computed < span.start

    def _in_turn(self) -> list[Sequence]:
        """The prompts with more than one missing token that have had no chunk since the last decode step.

        Those whose next tokens belong to a picture that is not encoded yet are left out.
        """
        prompts = [s for s in self._prefilling if s.n_missing > 1 and s.id not in self._served]
        if self._sight is not None:
            prompts = [sequence for sequence in prompts if self._sees(self._sight, sequence)]
        if not self._oldest_first:
            prompts.sort(key=lambda sequence: sequence.n_missing)
        return prompts
