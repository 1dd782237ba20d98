"""Plans the next step from slots, sequences and token budgets. Pure: it does not call MLX."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from exo.worker.runner_common.sequence import Phase, common_prefix
from exo.worker.runner_mlx.sequence import MlxSequence

WORTH_REUSING = 16
"""A cached prefix of this many tokens is preferred to the lowest free slot. Nearly all prompts share a few tokens."""


@dataclass(slots=True)
class MlxSlot:
    """A slot for one sequence: one row of the KV cache.

    ``cached`` are the tokens with usable cells, which stay after a sequence leaves, for later prompts.
    ``n_written`` is the number of cells written since they were last cleared. Both are valid only while the slot is
    free.
    """

    id: int
    cached: list[int] = field(default_factory=list[int])
    n_written: int = 0
    adapter: int = 0
    """The adapter that the cells were computed with; 0 for none."""
    sequence: MlxSequence | None = None


@dataclass(slots=True)
class PromptChunk:
    """``sequence.tokens[start:stop]`` of a prompt, to be prefilled."""

    sequence: MlxSequence
    start: int
    stop: int


@dataclass(slots=True)
class DecodeRow:
    """The token at ``position`` of a sequence, to be computed and followed by a new token."""

    sequence: MlxSequence
    position: int


@dataclass(slots=True)
class Stale:
    """Cells that the previous sequence left in a slot. They must be cleared."""

    slot: int
    start: int
    stop: int


@dataclass(slots=True)
class MlxStep:
    """Prompt chunks, then at most one row of each decoding sequence, in ascending order of slot."""

    chunks: list[PromptChunk] = field(default_factory=list[PromptChunk])
    rows: list[DecodeRow] = field(default_factory=list[DecodeRow])
    stale: list[Stale] = field(default_factory=list[Stale])
    started: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """The sequences that have entered a slot, by id, each with the number of its tokens found in the cache."""

    def __bool__(self) -> bool:
        return bool(self.chunks or self.rows)

    def processed(self) -> list[tuple[str, int]]:
        """Returns the tokens computed after this step, for each sequence in prefill or at its end."""
        done = {chunk.sequence.id: chunk.stop for chunk in self.chunks}
        done |= {row.sequence.id: row.position + 1 for row in self.rows if row.position + 1 == row.sequence.n_prefill}
        return list(done.items())


class MlxScheduler:
    """Owns the queue, the slots and the order in which prompts are prefilled.

    Invariants:

    - Every decoding sequence has a row in every step. A prompt's last token is its first row, even if nothing is to be
      generated, so all sampling happens in rows. The tokens before it are prefilled.
    - Prompts share ``chunk`` tokens a step and are cut at multiples of ``chunk``, so the cuts of a prompt do not depend
      on other sequences. A prompt that got a chunk moves to the end of the line.
    - A planned step counts as queued. The next one may be planned before its tokens are known.
    """

    def __init__(self, n_slots: int, chunk: int) -> None:
        self.slots = [MlxSlot(index) for index in range(n_slots)]
        self.waiting: deque[MlxSequence] = deque()
        self._prefilling: deque[MlxSequence] = deque()
        self._by_id: dict[str, MlxSequence] = {}
        self._chunk = chunk

    @property
    def n_active(self) -> int:
        """The number of sequences in slots."""
        return len(self._by_id) - len(self.waiting)

    def __bool__(self) -> bool:
        return bool(self._by_id)

    def add(self, sequence: MlxSequence) -> None:
        """Appends a sequence to the queue."""
        self._by_id[sequence.id] = sequence
        self.waiting.append(sequence)

    def sequences(self) -> Iterable[MlxSequence]:
        """All sequences that are not done."""
        return tuple(self._by_id.values())

    def remove(self, sequence_id: str, *, reusable: bool = True) -> MlxSequence | None:
        """Ends a sequence in any phase, frees its slot, and returns it; None if it is unknown.

        Later sequences may use the slot's cells unless ``reusable`` is false, as after a failure.
        """
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return None
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        else:
            slot = self.slots[sequence.slot]
            slot.sequence = None
            slot.cached = sequence.tokens[: sequence.n_queued] if reusable else []
            slot.n_written = sequence.n_queued
        if sequence.phase is Phase.PREFILL:
            self._prefilling.remove(sequence)
        sequence.move(Phase.DONE)
        return sequence

    def plan(self) -> MlxStep:
        """Returns the next step, which the caller must queue; an empty one if there is nothing to compute."""
        step = MlxStep()
        self._admit(step)
        self._prefill(step)
        for slot in self.slots:
            sequence = slot.sequence
            if sequence is None or sequence.phase is not Phase.DECODE:
                continue
            # With this row the sequence would have n_queued + 2 tokens: its input, and the one that follows.
            if sequence.n_queued + 2 <= max(sequence.n_limit, sequence.n_prefill + 1):
                step.rows.append(DecodeRow(sequence, sequence.n_queued))
                sequence.n_queued += 1
        return step

    def _admit(self, step: MlxStep) -> None:
        while self.waiting and (slot := self._choose_slot(self.waiting[0])) is not None:
            sequence = self.waiting.popleft()
            reusable = _reusable(slot, sequence)
            if reusable < slot.n_written:
                step.stale.append(Stale(slot.id, reusable, slot.n_written))
            slot.sequence, slot.adapter = sequence, sequence.adapter
            sequence.slot = slot.id
            sequence.n_queued = reusable
            sequence.move(Phase.PREFILL)
            self._prefilling.append(sequence)
            self._decode_if_prefilled(sequence)
            step.started.append((sequence.id, reusable))

    def _choose_slot(self, sequence: MlxSequence) -> MlxSlot | None:
        """Returns the free slot with the longest worthwhile prefix, or else the lowest, to keep busy slots together."""
        free = [slot for slot in self.slots if slot.sequence is None]

        def worth(slot: MlxSlot) -> tuple[int, int]:
            shared = _reusable(slot, sequence)
            return (shared if shared >= WORTH_REUSING else 0, -slot.id)

        return max(free, key=worth, default=None)

    def _prefill(self, step: MlxStep) -> None:
        budget = self._chunk
        for _ in range(len(self._prefilling)):
            sequence = self._prefilling[0]
            start = sequence.n_queued
            stop = min(len(sequence.tokens) - 1, (start // self._chunk + 1) * self._chunk)
            if stop - start > budget:
                break
            self._prefilling.rotate(-1)
            budget -= stop - start
            sequence.n_queued = stop
            step.chunks.append(PromptChunk(sequence, start, stop))
            self._decode_if_prefilled(sequence)

    def _decode_if_prefilled(self, sequence: MlxSequence) -> None:
        if sequence.n_queued == len(sequence.tokens) - 1:
            self._prefilling.remove(sequence)
            sequence.move(Phase.DECODE)


def _reusable(slot: MlxSlot, sequence: MlxSequence) -> int:
    """Returns how many leading tokens need not be computed again.

    The last token is always computed, because the first new token is sampled from its logits.
    """
    if not sequence.reads_cache or sequence.adapter != slot.adapter:
        return 0
    return min(common_prefix(slot.cached, sequence.tokens), len(sequence.tokens) - 1)
