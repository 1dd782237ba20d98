"""Decides what the next step computes. Knows slots, sequences and budgets; touches no library."""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice

from exo.worker.runner_cuda.prefix.cache import Found, PrefixCache
from exo.worker.runner_cuda.sequence import Phase, Sequence
from exo.worker.runner_cuda.slot import Slot
from exo.worker.runner_cuda.speculation.speculation import Speculation
from exo.worker.runner_cuda.step_time import Pace

LEAST = 64
"""Prompts are cut into chunks of no fewer tokens, the last one too, and only a prompt of fewer is computed as one chunk
of fewer: flash attention computes 64 rows or more by other means than fewer."""
GROUP = 8
"""All chunks but the last are multiples of this, since a matrix product takes rows by fours. Where a prompt is cut then
does not matter, bit for bit, on a CPU (cut otherwise, logits of a Q4_K_M model are up to 4.6 apart)."""
ALONE_SECONDS = 1.5
"""How long a step of a prompt may take while nothing else decodes: a request that comes meanwhile waits for its end."""
SCORED_ROWS = 32
"""Rows of a step that may tell a prompt's log-probabilities: each takes the width of the vocabulary in memory."""


@dataclass(slots=True)
class Chunk:
    """``sequence.tokens[start:stop]`` and then ``draft``, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int
    draft: list[int] = field(default_factory=list[int])
    """Tokens guessed to come next, each of which gives logits too."""

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return self.stop - self.start + len(self.draft)

    @property
    def samples(self) -> bool:
        """Whether every known token is computed after this chunk, so that its last row gives a new one."""
        return self.stop == len(self.sequence.tokens)

    @property
    def n_sampled(self) -> int:
        """Rows, the last ones, that tokens are chosen from."""
        return 1 + len(self.draft) if self.samples else 0

    @property
    def n_scored(self) -> int:
        """Rows, the first ones, that tell how probable the prompt's next token was."""
        if self.sequence.prompt_logprobs is None:
            return 0
        return max(0, min(self.stop, self.sequence.n_prompt - 1) - self.start)


@dataclass(slots=True)
class Step:
    """The rows of one batch, in ascending order of slot; and who entered a slot, with the tokens found cached there.

    Either every sequence that lacks one token gives it, and perhaps a draft, or prompts give chunks. llama.cpp would
    compute the two one after the other even in one batch, since it joins only as many rows of each sequence as all
    have, and would have every row attend over as many cells as the longest sequence has.
    """

    chunks: list[Chunk]
    started: list[tuple[str, int]]
    prefills: bool = False

    @property
    def n_rows(self) -> int:
        """Of the batch."""
        return sum(chunk.n_rows for chunk in self.chunks)


class Scheduler:
    """Waiting requests, slots and the order in which prompts get their turn.

    Steps of all decoding sequences and of prompts take turns. Between two of the first, prompts are computed for as
    many tokens as ``pace`` finds not to stall the streams, at most ``budget``, and of each at most ``chunk``. A step of
    prompts takes another one as long as it has fewer than ``enough`` tokens. The oldest prompt and the one that lacks
    the fewest tokens come first by turns: so a short one overtakes a long one, which still gets half of the time.
    Prompts are cut where that changes no results. One that is to be scored is cut at multiples of ``SCORED_ROWS``, and
    one such chunk a step is all that the context has logits for.

    Sequences that decode, with no prompt beside them, may have drafts verified: ``speculation`` makes them.
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
    ) -> None:
        """While no sequence decodes, a prompt's chunk has up to ``alone`` tokens, as far as a step stays short."""
        self.slots = [Slot(index) for index in range(n_slots)]
        self.waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        """In the order of their arrival."""
        self._left = 0
        """Prompt tokens that may be computed before the streams' next step."""
        self._streaming = False
        """Whether a sequence was decoding when the last step was planned."""
        self._served: set[str] = set()
        """Who has had a chunk since their last step."""
        self._oldest_first = True
        self._by_id: dict[str, Sequence] = {}
        self._budget = budget
        self._beside, self._alone = min(chunk, budget), min(alone or chunk, budget)
        self._chunk = self._alone
        """The most tokens of one prompt in the next step."""
        self._least = min(LEAST, self._beside)
        self._enough = min(enough, budget)
        self._pace = pace
        self._cache = cache
        self._speculation = speculation or Speculation("off")
        self._entered = 0

    @property
    def n_active(self) -> int:
        """Sequences in a slot."""
        return len(self._by_id) - len(self.waiting)

    def __bool__(self) -> bool:
        return bool(self._by_id)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, first in, first out."""
        self._by_id[sequence.id] = sequence
        self.waiting.append(sequence)

    def sequences(self) -> Iterable[Sequence]:
        """All that are not done."""
        return tuple(self._by_id.values())

    def remove(self, sequence_id: str) -> Sequence | None:
        """Ends a sequence wherever it stands and frees its slot, whose cells stay; None if it is not known."""
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return None
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        else:
            slot = self.slots[sequence.slot]
            slot.sequence = None
            self._cache.leave(slot)
        if sequence.phase is Phase.PREFILL:
            self._prefilling.remove(sequence)
        sequence.move(Phase.DONE)
        return sequence

    def plan(self) -> Step:
        """The next step; without chunks when there is nothing to do."""
        started = self._admit()
        due = [slot.sequence for slot in self.slots if slot.sequence is not None and slot.sequence.n_missing == 1]
        self._chunk = self._beside if due else self._pace.tokens_in(ALONE_SECONDS, self._beside, self._alone)
        if not due:
            self._left = self._budget
            self._served.clear()
        elif not self._streaming:  # the first streams of a burst wait no longer for their second token than others do
            self._left = min(self._left, self._pace.prompt_tokens(len(due), self._least, self._budget))
        self._streaming = bool(due)
        chunks = self._prefill_chunks()
        if chunks:
            self._left -= sum(chunk.n_rows for chunk in chunks)
            self._served.update(chunk.sequence.id for chunk in chunks)
            # llama.cpp computes consecutive, ascending sequence ids together and cuts the batch anywhere else.
            chunks.sort(key=lambda chunk: chunk.sequence.slot)
            return Step(chunks, started, prefills=True)
        drafts = [list[int]() for _ in due] if self._prefilling else self._speculation.drafts(due)
        chunks = [Chunk(s, s.n_computed, len(s.tokens), draft) for s, draft in zip(due, drafts, strict=True)]
        self._left = self._pace.prompt_tokens(len(due), self._least, self._budget)
        self._served.clear()
        return Step(chunks, started, prefills=False)

    def computed(self, step: Step, seconds: float) -> None:
        """Records that ``step`` is in the KV cache, and how long that took."""
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
            self._cache.promise(slot)
            if chunk.samples and sequence.phase is Phase.PREFILL:
                self._prefilling.remove(sequence)
                sequence.move(Phase.DECODE)

    def verified(self, chunk: Chunk) -> None:
        """Records how much of a draft has come true, now that the tokens after it are known, and drops the other cells.

        Also for a sequence that is done, whose slot keeps what it holds.
        """
        sequence, slot = chunk.sequence, self.slots[chunk.sequence.slot]
        came = sequence.tokens[chunk.stop : chunk.stop + len(chunk.draft)]
        n_true = next(
            (at for at, pair in enumerate(zip(came, chunk.draft, strict=False)) if pair[0] != pair[1]), len(came)
        )
        self._speculation.verified(sequence, n_true, missed=n_true < len(came))
        sequence.n_computed = chunk.stop + n_true
        slot.cached += came[:n_true]
        self._cache.drop_after(slot, sequence.n_computed)

    def wipe(self, spoilt: Collection[int]) -> None:
        """Overwrites what free slots hold, in which there is NaN or infinity."""
        sound = next((slot for slot in self.slots if slot.id not in spoilt), None)
        self._cache.wipe([self.slots[index] for index in spoilt], sound)

    def again(self, sequence: Sequence) -> None:
        """Has the last known token of a sequence in its slot, which is computed, computed once more."""
        slot = self.slots[sequence.slot]
        sequence.n_computed = len(sequence.tokens) - 1
        del slot.cached[sequence.n_computed :]
        self._cache.drop_after(slot, sequence.n_computed)

    def _admit(self) -> list[tuple[str, int]]:
        """Fills the free slots, first come, first served, but for those who wait for what another computes for them."""
        started: list[tuple[str, int]] = []
        for sequence in tuple(islice(self.waiting, len(self.slots))):
            if self.n_active == len(self.slots):
                break
            found = self._cache.find(sequence)
            if found is not None and self._cache.is_awaited(found):
                continue
            if found is not None and self._cache.needs_decode(found):
                if self.n_active:
                    continue
                found = None  # nothing else will be decoded, so waiting would never end
            slot = self._choose_slot(found)
            self._entered += 1
            slot.entered = self._entered
            self.waiting.remove(sequence)
            sequence.slot = slot.id
            sequence.n_computed = self._cache.enter(slot, sequence, found)
            sequence.move(Phase.PREFILL)
            self._prefilling.append(sequence)
            started.append((sequence.id, sequence.n_computed))
        return started

    def _choose_slot(self, found: Found | None) -> Slot:
        """Of the free slots, one beside busy ones, since each gap costs a computation of its own in every step.

        Of these the one that holds the prefix, if that is most of what it holds; else the one that was given to a
        sequence the longest time ago.
        """

        def busy(index: int) -> bool:
            return 0 <= index < len(self.slots) and self.slots[index].sequence is not None

        def cost(slot: Slot) -> tuple[int, bool, int]:
            stays = found is not None and found.holder is slot and 2 * found.length >= len(slot.cached)
            return -busy(slot.id - 1) - busy(slot.id + 1), not stays, slot.entered

        return min((slot for slot in self.slots if slot.sequence is None), key=cost)

    def _prefill_chunks(self) -> list[Chunk]:
        """Of the prompts whose turn it is, as far as tokens are left."""
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
        """The prompts that lack more than one token and have a chunk to get before the streams' next step."""
        prompts = [s for s in self._prefilling if s.n_missing > 1 and s.id not in self._served]
        if not self._oldest_first:
            prompts.sort(key=lambda sequence: sequence.n_missing)
        return prompts

    def _cut(self, sequence: Sequence, budget: int) -> int:
        """Where a prompt's next chunk ends: nowhere beyond its start if too little of the budget is left.

        The end of a prompt that is too short to be cut may be up to ``LEAST`` tokens over the budget.
        """
        start, missing = sequence.n_computed, sequence.n_missing
        if sequence.prompt_logprobs is not None:
            reach = start + min(budget, self._chunk, SCORED_ROWS)
            return len(sequence.tokens) if len(sequence.tokens) <= reach else reach // SCORED_ROWS * SCORED_ROWS
        size = min(budget, self._chunk)
        if missing <= size:
            return len(sequence.tokens)
        if budget < self._least:
            return start
        if missing < 2 * self._least <= self._chunk:
            return len(sequence.tokens)
        size = min(size, max(missing - self._least, self._least))
        return start + max(size // GROUP * GROUP, self._least)
