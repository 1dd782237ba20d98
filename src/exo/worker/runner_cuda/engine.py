"""The generate loop. One thread runs it, and no other touches the llama.cpp context."""

import time
from collections.abc import Generator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from exo.worker.protocol.messages import Cores, Failed, FinishReason
from exo.worker.runner_common.grammar.guided_decoding import Constraint, GrammarError, Mask, grammar_failure
from exo.worker.runner_common.output_processor import Cancelled, Emitter, PromptScored, Sampled, Scores, StepDone
from exo.worker.runner_cuda.bindings import Context, Logits
from exo.worker.runner_cuda.embedding import Embedder, Job
from exo.worker.runner_cuda.loading.threads import Threads
from exo.worker.runner_cuda.sampling.candidates import Candidates, NotFinite, Row
from exo.worker.runner_cuda.sampling.device_sampling import BackendSampling, Best
from exo.worker.runner_cuda.sampling.sampler import Sampler, Turn, choose, score
from exo.worker.runner_cuda.scheduler import Chunk, Scheduler, Step
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Leave:
    """A request that is to end: cancelled, or ended by a stop string, which its client has been ``told`` already."""

    id: str
    told: bool


class Stop:
    """Ends the loop."""


T = TypeVar("T")
Reading = Generator[Turn | Candidates, int | None, T]
"""Gives turns, is sent their tokens (None: the row's logits are not finite) and ends with a ``T``."""


class Engine:
    """Continuous batching over one context.

    A step: take commands, plan, fill the batch, decode, sample every row that is due, hand the tokens to the emitter.
    The emitter makes text of them while the next step is already computing.
    """

    def __init__(
        self,
        context: Context,
        embedder: Embedder,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        sampling: BackendSampling,
        threads: Threads,
        emitter: Emitter,
    ) -> None:
        self.commands: SimpleQueue[Sequence | Job | Leave | Cores | Stop] = SimpleQueue()
        self.steps = 0
        self._context = context
        self._embedder = embedder
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._threads = threads
        self._emitter = emitter

    def load(self) -> tuple[int, int, int]:
        """Steps so far, sequences or texts in work, those that wait. Safe to call from any thread."""
        scheduler, embedder = self._scheduler, self._embedder
        return self.steps, scheduler.n_active + embedder.n_active, len(scheduler.waiting) + len(embedder.waiting)

    def run(self) -> None:
        """Steps until told to stop; what is then in flight fails with code "shutdown". Raises EngineError."""
        while self._take_commands():
            if self._embedder:
                self._embed()
            step = self._scheduler.plan()
            if not step.chunks:
                continue
            n_outputs = self._fill(step)
            self._sampling.prepare(step)
            exact = any(chunk.sequence.exact for chunk in step.chunks)
            self._context.use_threads(*self._threads.counts(exact=exact))
            began = time.perf_counter()
            self._context.decode(step.n_rows)
            seconds = time.perf_counter() - began
            self._threads.computed(step.n_rows, seconds, prefills=step.prefills, exact=exact)
            self._scheduler.computed(step, seconds)
            processed = [(c.sequence.id, c.stop) for c in step.chunks if c.stop <= c.sequence.n_prefill]
            done = StepDone(step.started, processed)
            if n_outputs:
                self._read(step, self._context.logits(n_outputs), done)
            self.steps += 1
            self._emitter.put(done)
        for sequence in (*self._scheduler.sequences(), *self._embedder.jobs()):
            self._emitter.put(Failed(id=sequence.id, code="shutdown", message="the runner is shutting down"))

    def _embed(self) -> None:
        """One batch of texts, so that streams and texts take turns."""
        self._embedder.n_threads = self._threads.counts(exact=False)[1]
        for answer in self._embedder.step():
            self._emitter.put(answer)
        self.steps += 1

    def _take_commands(self) -> bool:
        """Waits for a command if there is nothing to compute. False to stop."""
        idle = not self._scheduler and not self._embedder
        while True:
            try:
                command = self.commands.get(block=idle)
            except Empty:
                return True
            idle = False
            match command:
                case Sequence():
                    self._scheduler.add(command)
                case Job():
                    self._embedder.waiting.append(command)
                case Leave():
                    found = self._scheduler.remove(command.id) is not None or self._embedder.remove(command.id)
                    if found and not command.told:
                        self._emitter.put(Cancelled(command.id))
                case Cores():
                    self._threads.restrict(command.count)
                case Stop():
                    return False

    def _fill(self, step: Step) -> int:
        """Writes the step into the batch; how many of its rows give logits."""
        batch = self._context.batch
        row = n_outputs = 0
        for chunk in step.chunks:
            end = row + chunk.n_rows
            batch.tokens[row:end] = chunk.sequence.tokens[chunk.start : chunk.stop] + chunk.draft
            batch.positions[row:end] = range(chunk.start, chunk.start + chunk.n_rows)
            batch.slots[row:end] = chunk.sequence.slot
            batch.outputs[row:end] = 0
            batch.outputs[row : row + chunk.n_scored] = 1
            batch.outputs[end - chunk.n_sampled : end] = 1
            n_outputs += chunk.n_scored + chunk.n_sampled
            row = end
        return n_outputs

    def _read(self, step: Step, logits: Logits, done: StepDone) -> None:
        """What the step's rows of logits, shape (rows, n_vocab), in batch order, say; into ``done``.

        One row of every sequence at a time, all of them chosen from together: whether a sequence's next row counts, and
        how it is adjusted, the token before it decides.
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
                self._scheduler.verified(chunk)
        self._scheduler.wipe([sequence.slot for sequence in spoilt])
        for sequence in again:
            self._sampling.read_whole(sequence)
            self._scheduler.again(sequence)

    def _go_on(
        self, sequence: Sequence, reading: Reading[None], token: int | None, spoilt: list[Sequence]
    ) -> Turn | Candidates | None:
        """The sequence's next turn, once it has the token of the last one; None: its rows are read.

        ``spoilt`` gets it where there are cells of it that nothing may be computed with.
        """
        try:
            return reading.send(token)
        except StopIteration:
            pass
        except NotFinite:
            message = "the model computed a logit that is not a number for this request"
            self._fail(Failed(id=sequence.id, code="engine_error", message=message))
            spoilt.append(sequence)
        except GrammarError as error:
            self._fail(grammar_failure(sequence.id, error))
        return None

    def _fail(self, failed: Failed) -> None:
        self._scheduler.remove(failed.id or "")
        self._emitter.put(failed)

    def _read_chunk(self, chunk: Chunk, rows: Logits, done: StepDone) -> Reading[None]:
        """Raises NotFinite and GrammarError."""
        sequence = chunk.sequence
        if sequence.prompt_logprobs is not None:
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
        """As ``_read_chunk``; into ``again`` a sequence whose row does not settle its token. Raises NotFinite."""
        sequence = chunk.sequence
        for best, guessed in zip(rows, [*chunk.draft, None], strict=True):
            if len(sequence.tokens) >= sequence.n_limit:
                self._end(sequence, "length", done)
                return
            choice = best.choice(sequence.sampler, len(sequence.tokens))
            if choice is None:
                again.append(sequence)
                return
            token = (yield from _take(choice)) if isinstance(choice, Candidates) else choice
            sampled = self._accept(sequence, token, None)
            done.sampled.append(sampled)
            if sampled.reason is not None or token != guessed:
                return

    def _next(self, sequence: Sequence, row: Row, done: StepDone) -> Reading[Sampled | None]:
        """The next token into ``done``; None if the sequence ends without one. Raises NotFinite and GrammarError."""
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
        """Goes on past the token. Raises GrammarError."""
        sequence.tokens.append(token)
        is_eog = self._tokenizer.is_eog(token)
        reason: FinishReason | None = None
        sequence.sampler.accept(token)
        if is_eog or _completed(sequence, token):
            reason = "stop"
        elif len(sequence.tokens) >= sequence.n_limit:
            reason = "length"
        if reason is not None:
            self._scheduler.remove(sequence.id)
        elif sequence.constraint is not None and not sequence.constraint.spared:
            sequence.constraint.prepare()
        return Sampled(sequence.id, token, reason, scores)


def _choose(sequence: Sequence, row: Row) -> Reading[int | None]:
    """The next token from its logits, which are changed; None if only an end is left, which the request ignores.

    Where the grammar is asked about a chosen token, that is before any mask is computed. Raises NotFinite and
    GrammarError.
    """
    sampler, constraint = sequence.sampler, sequence.constraint
    sampler.adjust(row)
    turn = Turn(sampler, row, len(sequence.tokens))
    if constraint is None:
        return (yield from _take(turn))
    if sampler.is_greedy and constraint.allows(token := (yield from _take(turn))):
        return token
    turn.allowed = _allowed(constraint, sampler)
    return (yield from _take(turn)) if turn.allowed.any() else None


def _take(turn: Turn | Candidates) -> Reading[int]:
    token = yield turn
    if token is None:
        raise NotFinite
    return token


def _allowed(constraint: Constraint, sampler: Sampler) -> Mask:
    """What its grammar lets a sequence go on with. Raises GrammarError."""
    allowed = constraint.mask()
    if sampler.forbidden:
        allowed = allowed.copy()
        allowed[list(sampler.forbidden)] = False
    return allowed


def _completed(sequence: Sequence, token: int) -> bool:
    """Whether the output matches the grammar with this token and cannot go on. Raises GrammarError."""
    if sequence.constraint is None:
        return False
    sequence.constraint.accept(token)
    return sequence.constraint.finished
