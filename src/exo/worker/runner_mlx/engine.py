"""The generate loop. One thread runs it and loads the model; no other touches MLX."""

from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import cast

import mlx.core as mx

from exo.worker.emitter import Cancelled, Emitter, Sampled, StepDone
from exo.worker.messages import Failed, FinishReason
from exo.worker.runner_mlx.kv_cache import KVCache
from exo.worker.runner_mlx.model import Model, queue, wait_for
from exo.worker.runner_mlx.sampler import FAILED, Sampler
from exo.worker.runner_mlx.scheduler import Chunk, Row, Scheduler, Step
from exo.worker.runner_mlx.sequence import Phase, Sequence
from exo.worker.runner_mlx.tokenizer import Tokenizer

STEPS_PER_SWEEP = 256
"""How often MLX gives back the buffers that it keeps for reuse, which shapes that grow leave behind."""


@dataclass(frozen=True, slots=True)
class Leave:
    """A request that is to end: cancelled, or (``told`` is true) already ended by a stop string."""

    id: str
    told: bool


class Stop:
    """Ends the loop."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A step that the device computes; ``done`` are its rows' tokens, shape (rows,), or any number if it has none."""

    step: Step
    done: mx.array


class Engine:
    """Continuous batching over one model and one KV cache.

    A step: take commands, plan, queue prompt chunks and one pass over all decoding rows with the sampling behind it;
    then, while the device computes that, read the tokens of the step before and hand them to the emitter. A sequence
    that ends with one of these has a row too many in the step that is queued; its token is not looked at.
    """

    def __init__(
        self, model: Model, cache: KVCache, scheduler: Scheduler, tokenizer: Tokenizer, emitter: Emitter
    ) -> None:
        self.commands: SimpleQueue[Sequence | Leave | Stop] = SimpleQueue()
        self.steps = 0
        self._model = model
        self._cache = cache
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._emitter = emitter
        self._sampler: Sampler

    def load(self) -> tuple[int, int, int]:
        """Steps so far, sequences in a slot, sequences waiting. Safe to call from any thread."""
        return self.steps, self._scheduler.n_active, len(self._scheduler.waiting)

    def run(self) -> None:
        """Steps until told to stop; what is then in flight fails with code "shutdown". Raises RuntimeError from MLX."""
        queued: Queued | None = None
        while self._take_commands(wait=queued is None and not self._scheduler):
            step = self._scheduler.plan()
            following = self._queue(step, queued) if step else None
            if queued is not None:
                self._finish(queued)
            queued = following
        for sequence in self._scheduler.sequences():
            self._emitter.put(Failed(id=sequence.id, code="shutdown", message="the runner is shutting down"))

    def _take_commands(self, *, wait: bool) -> bool:
        """False to stop."""
        while True:
            try:
                command = self.commands.get(block=wait)
            except Empty:
                return True
            wait = False
            match command:
                case Sequence():
                    self._scheduler.add(command)
                case Leave():
                    if self._scheduler.remove(command.id) is not None and not command.told:
                        self._emitter.put(Cancelled(command.id))
                case Stop():
                    return False

    # --- queueing a step ---

    def _queue(self, step: Step, before: Queued | None) -> Queued:
        for stale in step.stale:
            self._cache.clear(stale.slot, stale.start, stale.stop)
        for chunk in step.chunks:
            self._prefill(chunk)
        done = self._decode(step.rows, before) if step.rows else self._marker(step.chunks[-1])
        queue(done)
        return Queued(step, done)

    def _prefill(self, chunk: Chunk) -> None:
        """Fills the cache. The logits are never computed, as nothing asks for them."""
        sequence = chunk.sequence
        layers = self._cache.enter([sequence.slot], [chunk.start], chunk.stop - chunk.start)
        self._model.forward(mx.array([sequence.tokens[chunk.start : chunk.stop]]), layers)
        queue(self._cache.arrays())

    def _marker(self, chunk: Chunk) -> mx.array:
        return self._cache.marker(chunk.sequence.slot, chunk.stop - 1)

    def _decode(self, rows: list[Row], before: Queued | None) -> mx.array:
        """The next token of each row, shape (rows,)."""
        sequences = [row.sequence for row in rows]
        positions = [row.position for row in rows]
        if before is not None and sequences == [row.sequence for row in before.step.rows]:
            tokens = before.done
        else:
            tokens, unread = _inputs(rows, before)
            self._sampler = Sampler(sequences, self._tokenizer.n_vocab, unread)
        layers = self._cache.enter([sequence.slot for sequence in sequences], positions, 1)
        logits = self._model.forward(tokens[:, None], layers)[:, 0]
        return self._sampler.choose(logits, [position + 1 for position in positions])

    # --- finishing a step ---

    def _finish(self, queued: Queued) -> None:
        """Waits for a step and hands on what it brought."""
        step = queued.step
        wait_for(queued.done)
        tokens = cast(list[int], queued.done.tolist()) if step.rows else []
        taken = [self._take(row.sequence, token) for row, token in zip(step.rows, tokens, strict=True)]
        sampled = [one for one in taken if one is not None]
        self.steps += 1
        self._emitter.put(StepDone(cached=step.started, processed=step.processed(), sampled=sampled))
        if self.steps % STEPS_PER_SWEEP == 0:
            mx.clear_cache()

    def _take(self, sequence: Sequence, token: int) -> Sampled | None:
        """Adds a token to its sequence; None where that has left, or now fails."""
        if sequence.phase is Phase.DONE:
            return None
        if token == FAILED:
            self._scheduler.remove(sequence.id, reusable=False)
            message = "the model computed a logit that is not a number for this request"
            self._emitter.put(Failed(id=sequence.id, code="engine_error", message=message))
            return None
        sequence.tokens.append(token)
        is_eog = self._tokenizer.is_eog(token)
        reason: FinishReason | None = None
        if is_eog:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.n_limit:
            reason = "length"
        if reason is not None:
            self._scheduler.remove(sequence.id)
        return Sampled(sequence.id, token, reason, is_eog)


def _inputs(rows: list[Row], before: Queued | None) -> tuple[mx.array, mx.array | None]:
    """Each row's input token, and those of them that only the device knows yet (elsewhere ``FAILED``).

    A decoding sequence has a row in every step, so a token that is not known yet is one of the step before.
    """
    known = [row.sequence.tokens[row.position] if row.position < len(row.sequence.tokens) else FAILED for row in rows]
    tokens = mx.array(known)
    if before is None or FAILED not in known:
        return tokens, None
    places = {id(row.sequence): place for place, row in enumerate(before.step.rows)}
    unread = mx.where(tokens == FAILED, before.done[mx.array([places.get(id(r.sequence), 0) for r in rows])], FAILED)
    return mx.where(tokens == FAILED, unread, tokens), unread
