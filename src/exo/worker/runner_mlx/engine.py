"""The generate loop. One thread loads the model and runs it; no other touches MLX."""

from math import isnan

import mlx.core as mx
import numpy as np

from exo.worker.protocol.events import Failed, FinishReason
from exo.worker.runner_common.commands import Commands
from exo.worker.runner_common.grammar.guided_decoding import GrammarError, grammar_failure
from exo.worker.runner_common.output_processor import Emitter, PromptScored, StepDone
from exo.worker.runner_common.sequence import Phase, Sampled, Scores, append, not_finite
from exo.worker.runner_mlx.inflight_step import InflightStep, inputs
from exo.worker.runner_mlx.loading.loader import MlxLoaded
from exo.worker.runner_mlx.model import queue
from exo.worker.runner_mlx.sampling.logprobs import ROWS_AT_ONCE, score
from exo.worker.runner_mlx.sampling.sampler import FAILED, MlxSampler
from exo.worker.runner_mlx.scheduler import DecodeRow, MlxScheduler, MlxStep, PromptChunk
from exo.worker.runner_mlx.sequence import MlxSequence

STEPS_PER_SWEEP = 256
"""MLX keeps buffers for reuse. Growing shapes leave unused ones behind, which a sweep frees."""


class MlxEngine:
    """Continuous batching over one model and one KV cache.

    A step handles commands, plans, and queues prompt chunks and one pass over all decoding rows, with the sampling
    behind it. While the device computes, it reads the tokens of the step before and hands them to the emitter. A
    sequence that ends with one of these has an extra row in the queued step; its token is ignored.

    If a row may be restricted, the pass is queued at once, since its input is on the device. The sampling is queued
    after the tokens of the step before have been read and the masks are there. The device computes the pass meanwhile.
    """

    def __init__(self, loaded: MlxLoaded, emitter: Emitter) -> None:
        self._model = loaded.model
        self._cache = loaded.cache
        self._embedder = loaded.embedder
        self._scheduler = MlxScheduler(loaded.capabilities.slots, loaded.chunk)
        self._tokenizer = loaded.tokenizer
        self._emitter = emitter
        self._sampler: MlxSampler
        self._steps = 0
        self.commands: Commands[MlxSequence] = Commands(
            emitter, add=self._scheduler.add, add_text=self._embedder.waiting.append, remove=self._remove
        )

    def counts(self) -> tuple[int, int, int]:
        """Returns the steps so far, the sequences and texts in work, and those that wait. Safe in any thread."""
        scheduler, embedder = self._scheduler, self._embedder
        return self._steps, scheduler.n_active + embedder.n_active, len(scheduler.waiting) + len(embedder.waiting)

    def run(self) -> None:
        """Computes steps until the commands say ``Shutdown``. Raises RuntimeError from MLX."""
        queued: InflightStep | None = None
        while self.commands.handle(wait=queued is None and not self._scheduler and not self._embedder):
            step = self._scheduler.plan()
            following = self._queue(step, queued) if step else None
            if queued is not None:
                self._finish(queued)
            if following is not None and following.held is not None:
                self._choose(following, following.held)
            queued = following
            if self._embedder:
                self._embed()

    def _embed(self) -> None:
        """Computes one chunk of a text; streams and texts take turns."""
        for answer in self._embedder.step():
            self._emitter.put(answer)
        self._count_step()

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps % STEPS_PER_SWEEP == 0:
            mx.clear_cache()

    def _remove(self, request: str) -> bool:
        return self._scheduler.remove(request) is not None or self._embedder.remove(request)

    # --- queueing a step ---

    def _queue(self, step: MlxStep, before: InflightStep | None) -> InflightStep:
        queued = InflightStep(step)
        for stale in step.stale:
            self._model.clear(self._cache, stale.slot, stale.start, stale.stop)
        for chunk in step.chunks:
            self._prefill(chunk, queued)
        if not step.rows:
            queued.done = self._marker(step.chunks[-1])
            queue(queued.done)
            return queued
        logits = self._decode(step.rows, before)
        if any(_may_be_restricted(row.sequence) for row in step.rows):
            queued.held = logits
            queue(logits)
        else:
            self._choose(queued, logits)
        return queued

    def _prefill(self, chunk: PromptChunk, queued: InflightStep) -> None:
        """Fills the cache. Logits are computed only if log-probabilities of the prompt are wanted."""
        sequence = chunk.sequence
        tokens = mx.array([sequence.tokens[chunk.start : chunk.stop]])
        whole = sequence.prompt_logprobs is not None
        logits = self._model.forward(
            tokens, self._cache, [sequence.slot], [chunk.start], whole=whole, adapters=[sequence.adapter]
        )
        queue(self._cache.arrays())
        if sequence.prompt_logprobs is not None:
            self._score_prompt(chunk, logits[0], sequence.prompt_logprobs, queued)

    def _score_prompt(self, chunk: PromptChunk, logits: mx.array, k: int, queued: InflightStep) -> None:
        """Queues the log-probabilities of the tokens after the chunk's; logits have the shape (width, vocabulary)."""
        sequence = chunk.sequence
        stop = min(chunk.stop, sequence.n_prompt - 1)
        for start in range(chunk.start, stop, ROWS_AT_ONCE):
            n_rows = min(stop - start, ROWS_AT_ONCE)
            follow = mx.array(sequence.tokens[start + 1 : start + 1 + n_rows])
            at = start - chunk.start
            scores = score(logits[at : at + n_rows], follow, k)
            queue(scores)
            queued.prompts.append((sequence, scores))

    def _marker(self, chunk: PromptChunk) -> mx.array:
        return self._cache.marker(chunk.sequence.slot, chunk.stop - 1)

    def _decode(self, rows: list[DecodeRow], before: InflightStep | None) -> mx.array:
        """Returns the logits of each row, shape (rows, vocabulary)."""
        sequences = [row.sequence for row in rows]
        if before is not None and sequences == [row.sequence for row in before.step.rows]:
            tokens = before.done
        else:
            tokens, unread = inputs(rows, before)
            self._sampler = MlxSampler(sequences, self._tokenizer.n_vocab, unread)
        positions = [row.position for row in rows]
        slots = [sequence.slot for sequence in sequences]
        adapters = [sequence.adapter for sequence in sequences]
        return self._model.forward(tokens[:, None], self._cache, slots, positions, adapters=adapters)[:, 0]

    def _choose(self, queued: InflightStep, logits: mx.array) -> None:
        """Queues the sampling of a step's rows, and the log-probabilities of those that want them."""
        rows = queued.step.rows
        allowed = self._allowed(queued) if queued.held is not None else None
        queued.done = self._sampler.choose(logits, [row.position + 1 for row in rows], allowed)
        queued.held = None
        asked = [place for place, row in enumerate(rows) if row.sequence.logprobs is not None]
        if asked:
            sequences = [rows[place].sequence for place in asked]
            k = max(sequence.logprobs or 0 for sequence in sequences)
            queued.scores = sequences, score(logits[mx.array(asked)], queued.done[mx.array(asked)], k)
        queue(queued.done, *(queued.scores[1] if queued.scores else ()))

    def _allowed(self, queued: InflightStep) -> mx.array:
        """Returns the tokens that the rows' constraints allow, shape (rows, vocabulary)."""
        rows = queued.step.rows
        allowed = np.ones((len(rows), self._tokenizer.n_vocab), np.uint8)
        for mask, row in zip(allowed, rows, strict=True):
            sequence = row.sequence
            if sequence.constraint is None or not sequence.constraint.restricts() or sequence.phase is Phase.DONE:
                continue
            try:
                mask[:] = sequence.constraint.mask()
            except GrammarError as error:
                self._fail(sequence, grammar_failure(sequence.id, error))
            if row.position + 1 < sequence.ends_at:
                mask[list(sequence.ends)] = 0
            if not mask.any():
                queued.matched.add(sequence.id)
        return mx.array(allowed).astype(mx.bool_)

    # --- finishing a step ---

    def _finish(self, queued: InflightStep) -> None:
        """Waits for a step and hands its results to the emitter."""
        step = queued.step
        queued.wait()
        prompts = self._take_prompts(queued)
        scores = queued.token_scores()
        done = StepDone(cached=step.started, processed=step.processed(), sampled=[], prompts=prompts)
        for row, token in zip(step.rows, queued.tokens(), strict=True):
            sequence = row.sequence
            if sequence.phase is Phase.DONE:
                continue
            if len(sequence.tokens) >= sequence.n_limit:
                self._end(sequence, "length", done)
            elif sequence.id in queued.matched:
                self._end(sequence, "stop", done)
            elif sampled := self._take(sequence, token, scores.get(sequence.id)):
                done.sampled.append(sampled)
        self._emitter.put(done)
        self._count_step()

    def _take_prompts(self, queued: InflightStep) -> list[PromptScored]:
        """Returns the step's scores of prompts. A prompt of one token has none and is reported with its row."""
        found = [(sequence, arrays.read()) for sequence, arrays in queued.prompts]
        found += [
            (row.sequence, [])
            for row in queued.step.rows
            if row.sequence.prompt_logprobs is not None and row.sequence.n_prompt == 1 and not row.sequence.n_told
        ]
        told: list[PromptScored] = []
        for sequence, scores in found:
            if sequence.phase is Phase.DONE:
                continue
            if any(isnan(each.chosen) for each in scores):
                self._fail(sequence, not_finite(sequence.id))
                continue
            told.append(PromptScored.following(sequence.id, sequence.tokens, sequence.n_told, scores))
            sequence.n_told += len(told[-1].tokens)
        return told

    def _take(self, sequence: MlxSequence, token: int, scores: Scores | None) -> Sampled | None:
        """Appends a token to its sequence; None if the sequence fails."""
        if token == FAILED or (scores is not None and isnan(scores.chosen)):
            self._fail(sequence, not_finite(sequence.id))
            return None
        try:
            sampled = append(sequence, token, self._tokenizer, scores)
        except GrammarError as error:
            self._fail(sequence, grammar_failure(sequence.id, error))
            return None
        if sampled.reason is not None:
            self._scheduler.remove(sequence.id)
        return sampled

    def _end(self, sequence: MlxSequence, reason: FinishReason, done: StepDone) -> None:
        """Ends a sequence without a new token."""
        self._scheduler.remove(sequence.id)
        done.ended.append((sequence.id, reason))

    def _fail(self, sequence: MlxSequence, failed: Failed) -> None:
        """Ends one request, whose cells must not be reused."""
        self._scheduler.remove(sequence.id, reusable=False)
        self._emitter.put(failed)


def _may_be_restricted(sequence: MlxSequence) -> bool:
    """Whether a token may be excluded from the place after the next one: the next token may not be known yet."""
    return sequence.constraint is not None and sequence.constraint.restricts(2)
