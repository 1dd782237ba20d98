"""Decides what the next step computes. Knows slots, sequences and budgets; touches no library."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from exo.worker.runner_cuda.sequence import Phase, Sequence
from exo.worker.runner_cuda.slot import Slot

WORTH_REUSING = 16
"""Tokens in a slot's cache that make up for leaving the lowest slot free: every prompt shares BOS and some words."""


@dataclass(slots=True)
class Chunk:
    """``sequence.tokens[start:stop]``, to be computed in this step; ``samples`` if its last row gives a new token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether every known token is computed after this chunk."""
        return self.stop == len(self.sequence.tokens)


@dataclass(slots=True)
class Step:
    """The rows of one batch, in ascending order of slot; and who entered a slot, with the tokens found cached there."""

    chunks: list[Chunk]
    started: list[tuple[str, int]]


class Scheduler:
    """Waiting requests, slots and the order in which prompts get their turn.

    Every decoding sequence is in every step. Prompts share ``budget`` tokens a step, in chunks of at most ``chunk``,
    cut at multiples of ``chunk`` so that how a prompt is cut does not depend on who else is there; the prompt that got
    a chunk goes to the back of the line.
    """

    def __init__(self, n_slots: int, budget: int, chunk: int, trim: Callable[[int, int], bool]) -> None:
        """``trim(slot, length)`` cuts a slot's cache; false where the model's cache cannot be cut there."""
        self.slots = [Slot(index) for index in range(n_slots)]
        self.waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._by_id: dict[str, Sequence] = {}
        self._budget = budget
        self._chunk = min(chunk, budget)
        self._trim = trim

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
            self.slots[sequence.slot].sequence = None
        if sequence.phase is Phase.PREFILL:
            self._prefilling.remove(sequence)
        sequence.move(Phase.DONE)
        return sequence

    def plan(self) -> Step:
        """The next step; without chunks when there is nothing to do."""
        started = self._admit()
        chunks = [
            Chunk(slot.sequence, slot.sequence.n_computed, len(slot.sequence.tokens))
            for slot in self.slots
            if slot.sequence is not None and slot.sequence.phase is Phase.DECODE
        ]
        chunks += self._prefill_chunks()
        # llama.cpp computes consecutive, ascending sequence ids together and cuts the batch anywhere else.
        chunks.sort(key=lambda chunk: chunk.sequence.slot)
        return Step(chunks, started)

    def computed(self, step: Step) -> list[Sequence]:
        """Records that ``step`` is in the KV cache.

        Returns the sequences, in batch order, whose next token is now to be sampled.
        """
        sampling: list[Sequence] = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            sequence.n_computed = chunk.stop
            self.slots[sequence.slot].cached += sequence.tokens[chunk.start : chunk.stop]
            if chunk.samples:
                if sequence.phase is Phase.PREFILL:
                    self._prefilling.remove(sequence)
                    sequence.move(Phase.DECODE)
                sampling.append(sequence)
        return sampling

    def _admit(self) -> list[tuple[str, int]]:
        started: list[tuple[str, int]] = []
        while self.waiting and (slot := self._choose_slot(self.waiting[0])) is not None:
            sequence = self.waiting.popleft()
            # The last token is always computed again: its logits are what the first choice is made from.
            reusable = min(slot.common_prefix(sequence.tokens), len(sequence.tokens) - 1)
            if not self._trim(slot.id, reusable):
                self._trim(slot.id, 0)
                reusable = 0
            del slot.cached[reusable:]
            slot.sequence = sequence
            sequence.slot = slot.id
            sequence.n_computed = reusable
            sequence.move(Phase.PREFILL)
            self._prefilling.append(sequence)
            started.append((sequence.id, reusable))
        return started

    def _choose_slot(self, sequence: Sequence) -> Slot | None:
        """The free slot that holds most of the prompt, if it holds much; else the lowest, so that slots stay dense."""
        free = [slot for slot in self.slots if slot.sequence is None]

        def worth(slot: Slot) -> tuple[int, int]:
            shared = slot.common_prefix(sequence.tokens)
            return (shared if shared >= WORTH_REUSING else 0, -slot.id)

        return max(free, key=worth, default=None)

    def _prefill_chunks(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self._budget
        for _ in range(len(self._prefilling)):
            sequence = self._prefilling[0]
            start = sequence.n_computed
            stop = min(len(sequence.tokens), (start // self._chunk + 1) * self._chunk)
            if stop - start > budget:
                break
            self._prefilling.rotate(-1)
            budget -= stop - start
            chunks.append(Chunk(sequence, start, stop))
        return chunks
