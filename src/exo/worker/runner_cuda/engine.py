"""The generate loop. One thread runs it; no other touches the llama.cpp context."""

import time
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

from exo.worker.protocol.events import FinishReason
from exo.worker.runner_common.commands import Commands
from exo.worker.runner_common.constraint import Constraint
from exo.worker.runner_common.grammar.guided_decoding import GrammarError, Mask, grammar_failure
from exo.worker.runner_common.output_processor import Emitter, PromptScored, StepDone
from exo.worker.runner_common.request_checks import refused
from exo.worker.runner_common.sequence import Sampled, Scores, append, not_finite
from exo.worker.runner_cuda.bindings import Logits
from exo.worker.runner_cuda.sampling.candidates import Candidates, NotFinite, Row
from exo.worker.runner_cuda.sampling.device_sampling import Best
from exo.worker.runner_cuda.sampling.sampler import Turn, choose, score
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.speculation.head_context import states
from exo.worker.runner_cuda.speculation.head_drafter import HeadDrafter
from exo.worker.runner_cuda.step import Chunk, Step

if TYPE_CHECKING:
    from exo.worker.runner_cuda.loading.loader import Loaded

IDLE_SECONDS = 1.0
"""The time without work after which a prefix is written to disk. Agents call most tools in less."""
POLL_SECONDS = 0.002
"""The time between two looks at a file that is being read, while there is nothing else to compute."""
WRITE_SECONDS = 4.0
"""The time for writing prefixes when the runner is shut down. The server ends it after five."""

T = TypeVar("T")
Reading = Generator[Turn | Candidates, int | None, T]
"""Yields turns, gets their tokens (None if the row's logits are not finite) and returns a ``T``."""


class CudaEngine:
    """Continuous batching over one context.

    A step handles commands, plans, fills the batch, decodes, samples every row that is due and hands the tokens to the
    emitter. The emitter makes text of them while the next step computes.
    """

    def __init__(self, loaded: "Loaded", emitter: Emitter) -> None:
        self._context = loaded.context
        self._embedder = loaded.embedder
        self._scheduler = loaded.scheduler
        self._sight = loaded.sight
        self._tokenizer = loaded.tokenizer
        self._sampling = loaded.sampling
        self._head = loaded.draft if isinstance(loaded.draft, HeadDrafter) else None
        self._threads = loaded.threads
        self._emitter = emitter
        self._steps = 0
        self.commands: Commands[Sequence] = Commands(
            emitter,
            add=self._scheduler.add,
            add_text=self._embedder.waiting.append,
            remove=self._remove,
            use_cores=self._threads.restrict,
        )

    def counts(self) -> tuple[int, int, int]:
        """Returns the steps so far, the sequences and texts in work, and those that wait. Safe in any thread."""
        scheduler, embedder = self._scheduler, self._embedder
        steps = self._steps + (0 if self._sight is None else self._sight.n_steps)
        return steps, scheduler.n_active + embedder.n_active, len(scheduler.waiting) + len(embedder.waiting)

    def run(self) -> None:
        """Computes steps until the commands say ``Shutdown``. Raises EngineError.

        Prefixes are written to disk when there has been nothing to do for a moment, since that begins with a copy.
        """
        unwritten = True
        while self.commands.handle(wait=self._is_idle(), seconds=IDLE_SECONDS if unwritten else None):
            if self._is_idle():
                unwritten = self._scheduler.write_one()
                continue
            unwritten = True
            if self._embedder:
                self._embed()
            for request, fault in self._scheduler.blind():
                self._emitter.put(refused(request, "prompt", fault))
            step = self._scheduler.plan()
            if not step.chunks:
                if self._scheduler:
                    time.sleep(POLL_SECONDS)
                continue
            n_outputs = self._fill(step)
            self._sampling.prepare(step)
            self._context.use_adapters(step.adapter)
            exact = any(chunk.sequence.exact for chunk in step.chunks)
            self._context.use_threads(*self._threads.counts(exact=exact))
            began = time.perf_counter()
            self._decode(step)
            seconds = time.perf_counter() - began
            self._threads.computed(step.n_rows, seconds, prefills=step.prefills, exact=exact)
            self._scheduler.computed(step, seconds)
            new = [c for c in step.chunks if c.sequence.n_told < c.stop]
            processed = [(c.sequence.id, c.stop) for c in new if c.stop <= c.sequence.n_prefill]
            done = StepDone(step.started, processed, diverged=step.diverged)
            if n_outputs:
                self._read(step, self._context.logits(n_outputs), done)
            if self._head is not None and not all(chunk.sequence.pictures for chunk in step.chunks):
                self._head.observe(step.chunks, states(self._context, step.n_rows, self._head.width))
            for chunk in new:
                chunk.sequence.n_told = chunk.stop
            self._steps += 1
            self._emitter.put(done)
            self._scheduler.take_checkpoints(step)
        self._scheduler.write_all(WRITE_SECONDS)

    def _is_idle(self) -> bool:
        return not self._scheduler and not self._embedder

    def _embed(self) -> None:
        """Computes one batch of texts; streams and texts take turns."""
        self._embedder.n_threads = self._threads.counts(exact=False)[1]
        for answer in self._embedder.step():
            self._emitter.put(answer)
        self._steps += 1

    def _remove(self, request: str) -> bool:
        return self._scheduler.remove(request) is not None or self._embedder.remove(request)

    def _fill(self, step: Step) -> int:
        """Writes the step into the batch; returns the number of its rows that give logits."""
        batch = self._context.batch
        row = n_outputs = 0
        for chunk in step.chunks:
            end = row + chunk.n_rows
            batch.tokens[row:end] = chunk.sequence.tokens[chunk.start : chunk.stop] + chunk.draft
            first = chunk.sequence.position(chunk.start)
            batch.positions[row:end] = range(first, first + chunk.n_rows)
            batch.slots[row:end] = chunk.sequence.slot
            batch.outputs[row:end] = 0
            batch.outputs[row : row + chunk.n_scored] = 1
            batch.outputs[end - chunk.n_sampled : end] = 1
            n_outputs += chunk.n_scored + chunk.n_sampled
            row = end
        return n_outputs

    def _decode(self, step: Step) -> None:
        """Raises EngineError."""
        span = step.picture
        if span is None:
            self._context.decode(step.n_rows)
            return
        [chunk] = step.chunks
        part = chunk.start, chunk.stop
        places = span.places(*part, chunk.sequence.position(span.start))
        self._context.decode_vectors(span.vectors(*part), places, causal=not span.whole)
        if chunk.stop == span.stop and span.part + 1 == len(span.picture.parts):
            span.picture.parts = []  # they take megabytes, and its cells are in the cache now

    def _read(self, step: Step, logits: Logits, done: StepDone) -> None:
        """Adds to ``done`` the results of a step's logits, shape (rows, n_vocab), in batch order.

        Each pass chooses from one row of every sequence together. A sequence's next row depends on the token chosen
        before: whether it counts, and how it is adjusted.
        """
        at = 0
        best = self._sampling.read(step)
        again: list[Sequence] = []
        spoilt: list[Sequence] = []
        readings: list[tuple[Sequence, Reading[None]]] = []
        for chunk in step.chunks:
            rows = logits[at : at + chunk.n_scored + chunk.n_sampled]
            at += len(rows)
            largest = best.get(chunk.sequence.slot)
            whole = largest is None
            reading = self._read_chunk(chunk, rows, done) if whole else self._read_best(chunk, largest, done, again)
            readings.append((chunk.sequence, reading))
        tokens: list[int | None] = [None] * len(readings)
        while readings:
            due: list[tuple[Sequence, Reading[None]]] = []
            turns: list[Turn | Candidates] = []
            for (sequence, reading), token in zip(readings, tokens, strict=True):
                turn = self._go_on(sequence, reading, token, spoilt)
                if turn is not None:
                    due.append((sequence, reading))
                    turns.append(turn)
            readings, tokens = due, choose(turns)
        for chunk in step.chunks:
            if chunk.draft:
                accepted = self._scheduler.verified(chunk)
                done.drafted.append((chunk.sequence.id, len(chunk.draft), accepted))
        for sequence in again:
            self._sampling.read_whole(sequence)
            self._scheduler.recompute_last(sequence)
        for sequence in self._scheduler.spoilt(spoilt):
            self._emitter.put(not_finite(sequence.id))

    def _go_on(
        self, sequence: Sequence, reading: Reading[None], token: int | None, spoilt: list[Sequence]
    ) -> Turn | Candidates | None:
        """Gives a sequence the token of its last turn and returns its next turn; None after its last row.

        ``spoilt`` gets the sequence if its logits are not finite.
        """
        try:
            return reading.send(token)
        except StopIteration:
            pass
        except NotFinite:
            spoilt.append(sequence)
        except GrammarError as error:
            self._scheduler.remove(sequence.id)
            self._emitter.put(grammar_failure(sequence.id, error))
        return None

    def _read_chunk(self, chunk: Chunk, rows: Logits, done: StepDone) -> Reading[None]:
        """Raises NotFinite and GrammarError."""
        sequence = chunk.sequence
        # The last chunk of a prompt that is computed again also has the tokens that had followed it.
        if sequence.prompt_logprobs is not None and min(chunk.stop, sequence.n_prompt) > sequence.n_told:
            following = sequence.tokens[chunk.start + 1 : chunk.start + 1 + chunk.n_scored]
            k = sequence.prompt_logprobs
            found = [score(row, token, k) for row, token in zip(rows, following, strict=False)]
            if found or chunk.start == 0:
                told = chunk.start and chunk.start + 1
                done.prompts.append(PromptScored.following(sequence.id, sequence.tokens, told, found))
        for row, guessed in zip(rows[chunk.n_scored :], [*chunk.draft, None], strict=False):
            sampled = yield from self._next(sequence, row, done)
            if sampled is None or sampled.reason is not None or sampled.token != guessed:
                return

    def _read_best(self, chunk: Chunk, rows: list[Best], done: StepDone, again: list[Sequence]) -> Reading[None]:
        """Like ``_read_chunk``; ``again`` gets a sequence whose row does not decide its token. Raises NotFinite."""
        sequence = chunk.sequence
        for best, guessed in zip(rows, [*chunk.draft, None], strict=True):
            if len(sequence.tokens) >= sequence.n_limit:
                self._end(sequence, "length", done)
                return
            restricted = sequence.constraint is not None and sequence.constraint.restricts()
            choice = None if restricted else best.choice(sequence.sampler, len(sequence.tokens))
            if choice is None:
                again.append(sequence)
                return
            token = (yield from _take(choice)) if isinstance(choice, Candidates) else choice
            sampled = self._accept(sequence, token, None)
            done.sampled.append(sampled)
            if sampled.reason is not None or token != guessed:
                return

    def _next(self, sequence: Sequence, row: Row, done: StepDone) -> Reading[Sampled | None]:
        """Adds the next token to ``done``; None if the sequence ends without one. Raises NotFinite and GrammarError."""
        if len(sequence.tokens) >= sequence.n_limit:
            self._end(sequence, "length", done)
            return None
        computed = None if sequence.logprobs is None else row.copy()
        token = yield from _choose(sequence, row)
        if token is None:
            self._end(sequence, "stop", done)
            return None
        scores = None if computed is None else score(computed, token, sequence.logprobs or 0)
        sampled = self._accept(sequence, token, scores)
        done.sampled.append(sampled)
        return sampled

    def _end(self, sequence: Sequence, reason: FinishReason, done: StepDone) -> None:
        self._scheduler.remove(sequence.id)
        done.ended.append((sequence.id, reason))

    def _accept(self, sequence: Sequence, token: int, scores: Scores | None) -> Sampled:
        """Appends a token. Raises GrammarError."""
        sequence.sampler.accept(token)
        sampled = append(sequence, token, self._tokenizer, scores)
        if sampled.reason is not None:
            self._scheduler.remove(sequence.id)
        return sampled


def _choose(sequence: Sequence, row: Row) -> Reading[int | None]:
    """Chooses the next token and changes its logits; None if only an end is left, which the request ignores.

    A greedy choice is made first and checked by the constraint, since that is cheaper than a mask. Raises NotFinite and
    GrammarError.
    """
    sampler, constraint = sequence.sampler, sequence.constraint
    position = len(sequence.tokens)
    sampler.adjust(row, position)
    turn = Turn(sampler, row, position)
    if constraint is None or not constraint.restricts():
        return (yield from _take(turn))
    if sampler.is_greedy and constraint.allows(token := (yield from _take(turn))):
        return token
    turn.allowed = _allowed(constraint, sampler.forbidden(position))
    return (yield from _take(turn)) if turn.allowed.any() else None


def _take(turn: Turn | Candidates) -> Reading[int]:
    token = yield turn
    if token is None:
        raise NotFinite
    return token


def _allowed(constraint: Constraint, forbidden: Iterable[int]) -> Mask:
    """Returns the tokens that the constraint and the request allow. Raises GrammarError."""
    allowed = constraint.mask()
    if forbidden := list(forbidden):
        allowed = allowed.copy()
        allowed[forbidden] = False
    return allowed
