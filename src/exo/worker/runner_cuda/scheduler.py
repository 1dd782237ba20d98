"""Plans the next step from slots, sequences and token budgets. Pure: it does not call llama.cpp."""

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable
from itertools import islice

from exo.worker.runner_common.sequence import Phase, common_prefix
from exo.worker.runner_cuda.cell_pool import CellPool
from exo.worker.runner_cuda.prefix.cache import CachedPrefix, PrefixCache
from exo.worker.runner_cuda.prefix.host_tier import Saved
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.slot import Slot
from exo.worker.runner_cuda.speculation.speculation import Speculation
from exo.worker.runner_cuda.step import Chunk, Step
from exo.worker.runner_cuda.step_time import Pace

MIN_CHUNK = 64
"""The minimum chunk length, also of a prompt's last chunk. A shorter prompt is one chunk. Flash attention uses another
kernel below 64 rows, so a shorter chunk would change the results."""
CHUNK_MULTIPLE = 8
"""The length of every chunk but the last is a multiple of this, because a matrix product takes rows in groups of four.
On a CPU, the cuts then do not change a bit of the results; other cuts moved logits of a Q4_K_M model by up to 4.6."""
ALONE_SECONDS = 1.5
"""The longest prefill step while nothing decodes. A request that arrives during the step waits for its end."""
SPACING = 4096
"""The most prompt tokens between two checkpoints of a model that needs them."""
TAIL = 504
"""The distance of a checkpoint from the prompt's end if it is unknown where the last message starts. The rest, with
what ``CHUNK_MULTIPLE`` may add, is one full step of the default size: another stop would make the first token 7 %
later."""
SCORED_ROWS = 32
"""The most rows of a step that give prompt log-probabilities. Each takes the memory of a row of logits."""


class Scheduler:
    """Owns the queue, the slots and the order in which prompts are prefilled.

    Decode steps and prefill steps alternate. Invariants:

    - Between two decode steps, prompts get at most ``budget`` tokens, and no more than ``pace`` allows without stalling
      the streams. One prompt gets at most ``chunk`` of them. A prefill step takes further prompts while it has fewer
      than ``enough`` tokens.
    - The oldest prompt and the one with the fewest missing tokens come first in turn. A short prompt thus overtakes a
      long one, which still gets half of the time.
    - Prompts are cut only where that does not change the results. A prompt with log-probabilities is cut at multiples
      of ``SCORED_ROWS``, and a step has at most one such chunk, because the context has room for its logits only.
    - Drafts, which ``speculation`` makes, are verified only while no prompt is being prefilled.
    - With a ``pool``, a sequence enters when its prompt and its longest output fit beside what the others have by then,
      and none overtakes one that does not fit. If cells run out, free slots give up theirs, then the sequence that came
      last goes back to the queue; its cells are kept in RAM.
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
    ) -> None:
        """While no sequence decodes, a prompt's chunk has up to ``alone`` tokens, if ``ALONE_SECONDS`` suffice."""
        self.slots = [Slot(index) for index in range(n_slots)]
        self.waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []  # in order of arrival
        self._left = 0  # prompt tokens that may be computed before the next decode step
        self._streaming = False  # whether a sequence was decoding when the last step was planned
        self._served: set[str] = set()  # prompts that have had a chunk since the last decode step
        self._oldest_first = True
        self._by_id: dict[str, Sequence] = {}
        self._budget = budget
        self._beside, self._alone = min(chunk, budget), min(alone or chunk, budget)
        self._chunk = self._alone  # the most tokens of one prompt in the next step
        self._least = min(MIN_CHUNK, self._beside)
        self._enough = min(enough, budget)
        self._pace = pace
        self._cache = cache
        self._pool = pool
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
        self.waiting.append(sequence)

    def sequences(self) -> Iterable[Sequence]:
        """All sequences that are not done."""
        return tuple(self._by_id.values())

    def remove(self, sequence_id: str) -> Sequence | None:
        """Ends a sequence in any phase, and returns it; None if it is unknown. Its slot keeps the cached cells."""
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return None
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
            self._cache.unpark(sequence)
        else:
            slot = self.slots[sequence.slot]
            self._cache.leave(slot)
            slot.sequence = None
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
            self._left = self._budget
            self._served.clear()
        elif not self._streaming:  # the first streams of a burst wait for their second token no longer than others
            self._left = min(self._left, self._pace.prompt_tokens(len(due), self._least, self._budget))
        self._streaming = bool(due)
        chunks = self._with_room(self._prefill_chunks())
        if chunks:
            self._left -= sum(chunk.n_rows for chunk in chunks)
            self._served.update(chunk.sequence.id for chunk in chunks)
            # llama.cpp computes consecutive, ascending sequence ids together and cuts the batch anywhere else.
            chunks.sort(key=lambda chunk: chunk.sequence.slot)
            return Step(chunks, started, prefills=True, diverged=diverged)
        due = [sequence for sequence in due if sequence.phase is not Phase.WAITING]
        drafts = [list[int]() for _ in due] if self._prefilling else self._speculation.drafts(due)
        chunks = [Chunk(s, s.n_computed, len(s.tokens), draft) for s, draft in zip(due, drafts, strict=True)]
        chunks = self._with_room(chunks)
        self._left = self._pace.prompt_tokens(len(due), self._least, self._budget)
        self._served.clear()
        return Step(chunks, started, prefills=False, diverged=diverged)

    def computed(self, step: Step, seconds: float) -> None:
        """Records that ``step`` is in the KV cache, and the time it took."""
        if step.prefills:
            self._pace.prefilled(step.n_rows, seconds)
        else:
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
            if found is not None and self._cache.is_awaited(found):
                self._await(found)
                continue
            if found is not None and self._cache.needs_decode(found):
                if self.n_active:
                    continue
                found = None  # nothing else will be decoded, so waiting would never end
            if not self._has_room(sequence, found):
                break
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
        sequence.marks = [move.target for move in sequence.moves] or self._marks(sequence)
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

    def _marks(self, sequence: Sequence) -> list[int]:
        """Returns where a prompt's prefill stops for checkpoints.

        These are the last message's start, or ``TAIL`` before the end if no message starts are known; one in every
        ``SPACING`` tokens, if possible where a message starts; and, if the cells cannot be cut by a single token, a
        place just before the end. No stop changes a result; see ``CHUNK_MULTIPLE``.
        """
        if not self._cache.takes_checkpoints or sequence.prompt_logprobs is not None:
            return []
        start, end = sequence.n_computed, sequence.n_prefill - self._least
        starts = [at for at in sequence.boundaries if start + self._least <= at <= end]
        wanted = starts[-1:] or [sequence.n_prefill - TAIL]
        if not self._cache.can_cut:
            wanted.append(end)
        at = start + SPACING
        while at < end:
            before = bisect_right(starts, at)
            near = before > 0 and starts[before - 1] > at - SPACING // 2
            wanted.append(starts[before - 1] if near else at)
            at = wanted[-1] + SPACING
        marks: list[int] = []
        for stop in sorted(start + (each - start) // CHUNK_MULTIPLE * CHUNK_MULTIPLE for each in wanted):
            if stop - (marks[-1] if marks else start) >= self._least:
                marks.append(stop)
        return marks

    def _await(self, found: CachedPrefix) -> None:
        """Has a sequence stop for a checkpoint at the end of the prefix that another one waits for."""
        sequence = found.holder.sequence if isinstance(found.holder, Slot) else None
        if sequence is None or not self._cache.takes_checkpoints:
            return
        start = sequence.n_computed
        stop = start + (found.promised - start) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
        if self._least <= stop - start and stop <= sequence.n_prefill - self._least:
            others = [mark for mark in sequence.marks if abs(mark - stop) >= self._least]
            sequence.marks = sorted([*others, stop])

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

    def _prefill_chunks(self) -> list[Chunk]:
        """Returns chunks of the prompts in turn, within the tokens left."""
        chunks: list[Chunk] = []
        n_rows, scored = 0, False
        for sequence in self._in_turn():
            chunk = Chunk(sequence, sequence.n_computed, self._cut(sequence, self._left - n_rows))
            if chunk.stop <= chunk.start or (scored and chunk.n_scored):
                continue
            n_rows += chunk.n_rows
            scored = scored or chunk.n_scored > 0
            chunks.append(chunk)
            if n_rows >= self._enough:
                break
        if chunks:
            self._oldest_first = not self._oldest_first
        return chunks

    def _in_turn(self) -> list[Sequence]:
        """The prompts with more than one missing token that have had no chunk since the last decode step."""
        prompts = [s for s in self._prefilling if s.n_missing > 1 and s.id not in self._served]
        if not self._oldest_first:
            prompts.sort(key=lambda sequence: sequence.n_missing)
        return prompts

    def _cut(self, sequence: Sequence, budget: int) -> int:
        """Returns where a prompt's next chunk ends, which is its start if the rest of the budget is too small.

        It ends at the prompt's next mark at the latest. Unless log-probabilities are wanted, neither the chunk nor the
        rest of the prompt becomes shorter than ``MIN_CHUNK``: a rest that is too short to be cut may exceed the budget
        by up to ``MIN_CHUNK`` tokens.
        """
        start = sequence.n_computed
        end = next((mark for mark in sequence.marks if mark > start), len(sequence.tokens))
        missing = end - start
        if sequence.prompt_logprobs is not None:
            reach = start + min(budget, self._chunk, SCORED_ROWS)
            return len(sequence.tokens) if len(sequence.tokens) <= reach else reach // SCORED_ROWS * SCORED_ROWS
        size = min(budget, self._chunk)
        if missing <= size:
            return end
        if budget < self._least:
            return start
        if missing < 2 * self._least <= self._chunk:
            return end
        size = min(size, max(missing - self._least, self._least))
        return start + max(size // CHUNK_MULTIPLE * CHUNK_MULTIPLE, self._least)
