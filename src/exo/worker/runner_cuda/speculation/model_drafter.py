"""A draft model: a small model that guesses the next tokens of the large one, in a context with the same slots."""

import time
from collections.abc import Sequence
from itertools import islice

import llama_cpp

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import Context, Logits
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.threads import Threads
from exo.worker.runner_cuda.prompt_cuts import MIN_CHUNK
from exo.worker.runner_cuda.sampling.candidates import NotFinite
from exo.worker.runner_cuda.sampling.sampler import Turn, choose
from exo.worker.runner_cuda.sequence import Sequence as Stream
from exo.worker.runner_cuda.tokenizer import GgufTokenizer

LITTLE = 16
"""Missing tokens of a sequence that a draft computes along the way. More are computed in steps before it."""
_KEPT = 0.7
"""The weight of earlier times per guess when a new one is added."""


class DraftModel:
    """Guesses tokens with each sequence's own sampler.

    The sampler's noise depends on seed and position alone, so both models draw the same token where they find the same
    tokens probable. The model follows a sequence by comparing its tokens with its own cells: a rejected guess, a new
    sequence in the slot and a replay all show as tokens that differ.
    """

    def __init__(
        self, model: Model, context: Context, n_slots: int, chunk: int, longest: int, threads: Threads
    ) -> None:
        """``context`` has room for ``chunk`` rows and ``n_slots`` rows of logits in a step."""
        self.seconds = 0.0
        self.longest = longest
        self._model = model
        self._context = context
        self._threads = threads
        self._chunk = chunk
        self._held: list[list[int]] = [[] for _ in range(n_slots)]  # the tokens with cells in each slot
        # The sequence that each slot was last compared with, and the length of their common prefix.
        self._agreed: list[tuple[Stream | None, int]] = [(None, 0)] * n_slots

    def catch_up(self, streams: Sequence[Stream]) -> bool:
        """Computes a chunk of missing tokens of one sequence. Returns whether the model is ready to guess.

        The chunk is small if there are other streams, so that a long prompt does not stall them.
        """
        self._context.use_threads(*self._threads.counts(exact=False))
        lacking = [(stream, self._aligned(stream)) for stream in streams]
        behind = [(stream, start) for stream, start in lacking if len(stream.tokens) - start > LITTLE]
        for stream, start in islice(behind, 1):
            chunk = self._chunk if len(streams) == 1 else min(self._chunk, MIN_CHUNK)
            stop = min(len(stream.tokens) - 1, start + chunk)
            self._fill(0, stream, start, stream.tokens[start:stop])
            self._context.decode(stop - start)
            self._held[stream.slot] += stream.tokens[start:stop]
        return not behind

    def draft(self, streams: Sequence[Stream], size: int) -> list[list[int]]:
        """Returns ``size`` guesses for each sequence, or none for all if the logits are not finite."""
        began = time.perf_counter()
        drafts: list[list[int]] = [[] for _ in streams]
        try:
            row = 0
            for stream in streams:
                start = self._aligned(stream)
                row = self._fill(row, stream, start, stream.tokens[start:], output=True)
                self._held[stream.slot] += stream.tokens[start:]
            self._guess(streams, row, drafts)
            for _ in range(size - 1):
                for row, (stream, draft) in enumerate(zip(streams, drafts, strict=True)):
                    self._fill(row, stream, len(self._held[stream.slot]), draft[-1:], output=True)
                    self._held[stream.slot].append(draft[-1])
                self._guess(streams, len(streams), drafts)
        except NotFinite:
            drafts = [[] for _ in streams]
            for stream in streams:
                stream.draft_rate.seen(hit=False)
        took = (time.perf_counter() - began) / size
        self.seconds = _KEPT * self.seconds + (1 - _KEPT) * took if self.seconds else took
        return drafts

    def free(self) -> None:
        """Call from the thread that decodes."""
        self._context.free()
        self._model.free()

    def _aligned(self, stream: Stream) -> int:
        """Drops the cells of tokens that are not the sequence's. Returns how many are left, at most all but one."""
        held, (known, length) = self._held[stream.slot], self._agreed[stream.slot]
        length = length if known is stream else 0
        most = min(len(held), len(stream.tokens) - 1)
        while length < most and held[length] == stream.tokens[length]:
            length += 1
        if length < len(held):
            length = length if length >= self._context.least(stream.slot) else 0
            self._context.trim(stream.slot, length)
            del held[length:]
        self._agreed[stream.slot] = stream, length
        return length

    def _fill(self, row: int, stream: Stream, start: int, tokens: Sequence[int], *, output: bool = False) -> int:
        """Writes tokens, from position ``start`` on, into the batch from ``row`` on. Returns the row after them."""
        batch, end = self._context.batch, row + len(tokens)
        batch.tokens[row:end] = tokens
        batch.positions[row:end] = range(start, start + len(tokens))
        batch.slots[row:end] = stream.slot
        batch.outputs[row:end] = 0
        batch.outputs[end - 1] = output
        return end

    def _guess(self, streams: Sequence[Stream], n_rows: int, drafts: Sequence[list[int]]) -> None:
        """Computes the batch and appends a token to each draft. Raises NotFinite."""
        self._context.decode(n_rows)
        positions = [len(self._held[stream.slot]) for stream in streams]
        for draft, token in zip(drafts, guesses(streams, self._context.logits(len(streams)), positions), strict=True):
            draft.append(token)


def guesses(streams: Sequence[Stream], logits: Logits, positions: Sequence[int]) -> list[int]:
    """Returns the token that each sequence's sampler draws at its position. Changes the logits. Raises NotFinite."""
    turns: list[Turn] = []
    for stream, row, position in zip(streams, logits, positions, strict=True):
        stream.sampler.adjust(row, position)
        turns.append(Turn(stream.sampler, row, position))
    tokens = [token for token in choose(turns) if token is not None]
    if len(tokens) < len(turns):
        raise NotFinite
    return tokens


def check_vocabulary(draft: Model, target: Model) -> None:
    """Raises LoadError unless both models have the same vocabulary."""
    if draft.n_vocab != target.n_vocab:
        raise LoadError("model_load_failed", f"it has {draft.n_vocab:,} tokens, the model has {target.n_vocab:,}")
    kinds = [llama_cpp.llama_vocab_type(model.vocab) for model in (draft, target)]
    if kinds[0] != kinds[1]:
        raise LoadError("model_load_failed", "its vocabulary is of another kind than the model's")
    for token in range(target.n_vocab):
        if llama_cpp.llama_vocab_get_text(draft.vocab, token) != llama_cpp.llama_vocab_get_text(target.vocab, token):
            mine, theirs = (GgufTokenizer(model).text_of(token) for model in (draft, target))
            raise LoadError("model_load_failed", f"its token {token:,} is {mine!r}, the model's {theirs!r}")
