"""Drafts from the model's own head for multi-token prediction, for any number of slots."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from exo.worker.runner_common.sequence import common_prefix
from exo.worker.runner_cuda.loading.threads import Threads
from exo.worker.runner_cuda.sampling.candidates import NotFinite
from exo.worker.runner_cuda.sequence import Sequence as Stream
from exo.worker.runner_cuda.speculation.head_context import HeadContext, States
from exo.worker.runner_cuda.speculation.model_drafter import guesses
from exo.worker.runner_cuda.step import Chunk

WAITING = 64
"""The most rows of a slot that wait to be computed together. Fewer are computed with the next draft."""
LONGEST = 8
"""The most tokens of a draft. A head is trained for the first of them."""
_KEPT = 0.7
"""The weight of earlier times per guess when a new one is added."""
_State = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Track:
    """The tokens of a slot that the head has seen, from position ``first`` on."""

    stream: Stream | None = None
    first: int = 0
    tokens: list[int] = field(default_factory=list[int])
    waiting: list[_State | None] = field(default_factory=list["_State | None"])
    """For each of the last tokens, which have no cells yet: the state of the token before it, None if unknown."""
    last: _State | None = None
    """The state of the last token."""

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.first + len(self.tokens)

    def is_at(self, stream: Stream) -> bool:
        """Whether the sequence's last token is the only one that the head has not seen."""
        return self.stream is stream and self.last is not None and self.end == len(stream.tokens) - 1


class HeadDrafter:
    """Gives the head each token that the model has computed, and has it guess the next ones.

    The head attends to the tokens that were computed in the slot. Those of a prefix that came from another slot, RAM or
    disk are missing, which can make guesses worse, and nothing else.
    """

    def __init__(self, context: HeadContext, n_slots: int, threads: Threads) -> None:
        """``context`` has room for ``WAITING`` rows of each slot in a step."""
        self.seconds = 0.0
        self.longest = LONGEST
        self.width = context.width
        self._context = context
        self._threads = threads
        self._tracks = [_Track() for _ in range(n_slots)]

    def observe(self, chunks: Sequence[Chunk], states: States) -> None:
        """Takes the states of a step's rows once its tokens are chosen.

        Rows of wrong guesses are left out, and sequences with pictures, whose tokens the head cannot be given.
        """
        row = 0
        for chunk in chunks:
            count = min(chunk.sequence.n_computed - chunk.start, chunk.n_rows)
            if count > 0 and chunk.sequence.slot >= 0 and not chunk.sequence.pictures:
                self._follow(chunk.sequence, chunk.start, states[row : row + count].copy())
            row += chunk.n_rows

    def catch_up(self, streams: Sequence[Stream]) -> bool:
        """Returns true: no token of a sequence that decodes is missing."""
        return True

    def draft(self, streams: Sequence[Stream], size: int) -> list[list[int]]:
        """Returns ``size`` guesses for each sequence that the head has followed, and none for the others."""
        began = time.perf_counter()
        self._context.use_threads(*self._threads.counts(exact=False))
        drafts: dict[str, list[int]] = {}
        ready = [(stream, track) for stream in streams if (track := self._tracks[stream.slot]).is_at(stream)]
        self._compute_waiting([track for _, track in ready])
        row = 0
        for stream, track in ready:
            row = self._fill(row, stream.slot, track.end, stream.tokens[-1], track.last, output=True)
        try:
            for step in range(size if ready else 0):
                self._context.decode(row)
                logits, states = self._context.outputs(row)
                states = states.copy()
                positions = [track.end + 1 + step for _, track in ready]
                found = guesses([stream for stream, _ in ready], logits, positions)
                row = 0
                for (stream, track), token, state in zip(ready, found, states, strict=True):
                    drafts.setdefault(stream.id, []).append(token)
                    row = self._fill(row, stream.slot, track.end + 1 + step, token, state, output=True)
        except NotFinite:
            drafts.clear()
            self._tracks = [_Track() for _ in self._tracks]
            self._context.clear()
            for stream, _ in ready:
                stream.draft_rate.seen(hit=False)
            return [[] for _ in streams]
        for stream, track in ready:
            self._context.trim(stream.slot, track.end)
        took = (time.perf_counter() - began) / size
        self.seconds = _KEPT * self.seconds + (1 - _KEPT) * took if self.seconds else took
        return [drafts.get(stream.id, []) for stream in streams]

    def free(self) -> None:
        """Call from the thread that decodes, before the model is freed."""
        self._context.free()

    def _follow(self, stream: Stream, start: int, states: States) -> None:
        """Adds tokens that the model has computed, and computes those that wait if they are many."""
        track = self._tracks[stream.slot]
        self._align(track, stream, start)
        track.waiting += [track.last, *states[:-1]]
        track.tokens += stream.tokens[start : start + len(states)]
        track.last = states[-1]
        while len(track.waiting) >= WAITING:
            self._context.use_threads(*self._threads.counts(exact=False))
            self._compute_waiting([track])

    def _align(self, track: _Track, stream: Stream, start: int) -> None:
        """Drops what the slot's track has beyond the sequence's first ``start`` tokens; all of it if one differs."""
        kept = start - track.first
        if not 0 <= kept <= len(track.tokens):
            kept = 0
        elif track.stream is not stream:
            before = stream.tokens[track.first : start]
            kept = kept if common_prefix(track.tokens, before) == kept else 0
        track.stream = stream
        if kept == len(track.tokens) and track.tokens:
            return
        computed = len(track.tokens) - len(track.waiting)
        del track.tokens[kept:], track.waiting[max(0, kept - computed) :]
        track.last = None
        track.first = start - kept
        self._context.trim(stream.slot, start if kept else 0)

    def _compute_waiting(self, tracks: Sequence[_Track]) -> None:
        """Computes up to ``WAITING`` tokens of each track that have no cells.

        No row gives logits: with such rows, llama.cpp would return the states of the batch's first rows for theirs.
        """
        row = 0
        for track in tracks:
            assert track.stream is not None
            start = len(track.tokens) - len(track.waiting)
            for at, state in enumerate(track.waiting[:WAITING], start):
                row = self._fill(row, track.stream.slot, track.first + at, track.tokens[at], state)
            del track.waiting[:WAITING]
        if row:
            self._context.decode(row)

    def _fill(
        self, row: int, slot: int, position: int, token: int, state: _State | None, *, output: bool = False
    ) -> int:
        """Writes a row into the batch. Returns the row after it."""
        batch = self._context.batch
        batch.tokens[row], batch.positions[row], batch.slots[row], batch.outputs[row] = token, position, slot, output
        self._context.states[row] = 0.0 if state is None else state
        return row + 1
