"""The generate loop. One thread runs it and loads the model; no other touches vLLM."""

from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exo.worker.protocol.messages import Failed, FinishReason
from exo.worker.runner_common.grammar.guided_decoding import GrammarError, grammar_failure
from exo.worker.runner_common.hf_embedding import Job, answer
from exo.worker.runner_common.hf_tokenizer import Tokenizer
from exo.worker.runner_common.output_processor import Cancelled, Emitter, PromptScored, Sampled, StepDone
from exo.worker.runner_vllm.sequence import Sequence

if TYPE_CHECKING:
    from exo.worker.runner_vllm.vllm_edge import Core, Output


@dataclass(frozen=True, slots=True)
class Leave:
    """A request that is to end: cancelled, or (``told`` is true) already ended by a stop string."""

    id: str
    told: bool


class Stop:
    """Ends the loop."""


class Engine:
    """Hands sequences or texts to vLLM, which batches them, and hands on what each step brings."""

    def __init__(self, core: "Core", tokenizer: Tokenizer, emitter: Emitter) -> None:
        self.commands: SimpleQueue[Sequence | Job | Leave | Stop] = SimpleQueue()
        self._core = core
        self._tokenizer = tokenizer
        self._emitter = emitter
        self._sequences: dict[str, Sequence] = {}
        self._texts: dict[str, Job] = {}

    def load(self) -> tuple[int, int, int]:
        """Steps so far, sequences or texts in work, those that wait. Safe to call from any thread."""
        return self._core.steps, *self._core.counts

    def run(self) -> None:
        """Steps until told to stop; what is then in flight fails with code "shutdown". Raises what vLLM raises."""
        while self._take_commands(wait=not (self._sequences or self._texts)):
            if self._sequences or self._texts:
                self._step()
        for request in (*self._sequences, *self._texts):
            self._emitter.put(Failed(id=request, code="shutdown", message="the runner is shutting down"))

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
                    self._sequences[command.id] = command
                    self._core.add(command)
                case Job():
                    self._texts[command.id] = command
                    self._core.add_text(command)
                case Leave():
                    if self._remove(command.id) and not command.told:
                        self._emitter.put(Cancelled(command.id))
                case Stop():
                    return False

    def _step(self) -> None:
        done = StepDone(cached=[], processed=[])
        outputs = self._core.step()
        self._report_progress(done)
        for output in outputs:
            sequence, text = self._sequences.get(output.id), self._texts.get(output.id)
            if sequence is not None:
                self._take(sequence, output, done)
            elif text is not None and (output.vector is not None or output.broken):
                self._answer(text, output.vector)
        self._emitter.put(done)

    def _report_progress(self, done: StepDone) -> None:
        """How far prompts have come."""
        for sequence in self._sequences.values():
            if sequence.n_processed == sequence.n_prefill:
                continue
            progress = self._core.progress[sequence.id]
            processed = min(progress.computed, sequence.n_prefill)
            if processed > sequence.n_processed:
                if sequence.n_processed == 0:
                    done.cached.append((sequence.id, progress.cached))
                sequence.n_processed = processed
                done.processed.append((sequence.id, processed))

    def _answer(self, text: Job, pooled: npt.NDArray[np.float64] | None) -> None:
        """None: vLLM gave it up."""
        self._remove(text.id)
        answered = not_finite(text.id) if pooled is None else answer(text, pooled)
        self._emitter.put(answered)
        if isinstance(answered, Failed):
            self._core.clear_unused()

    def _take(self, sequence: Sequence, output: "Output", done: StepDone) -> None:
        """Adds what a step brought to its sequence, and ends it where that was the last."""
        choice = sequence.choice
        if output.broken:
            self._core.discard(sequence.id)
            self._fail(sequence, not_finite(sequence.id))
            return
        if output.prompt_scores is not None:
            n_prompt = choice.n_prompt
            scores = output.prompt_scores[: n_prompt - 1]
            done.prompts.append(PromptScored.following(sequence.id, sequence.tokens, 0, scores))
        if output.token is None:
            return
        if choice.wrong is not None:
            self._fail(sequence, grammar_failure(sequence.id, GrammarError(choice.wrong)))
        elif len(sequence.tokens) >= sequence.n_limit:
            self._end(sequence, "length", done)
        elif choice.matched:
            self._end(sequence, "stop", done)
        else:
            self._append(sequence, output, output.token, done)

    def _append(self, sequence: Sequence, output: "Output", token: int, done: StepDone) -> None:
        sequence.tokens.append(token)
        is_eog = self._tokenizer.is_eog(token)
        try:
            matched = not is_eog and self._advance(sequence, token)
        except GrammarError as error:
            self._fail(sequence, grammar_failure(sequence.id, error))
            return
        reason: FinishReason | None = None
        if is_eog or matched:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.n_limit:
            reason = "length"
        if reason is not None:
            self._remove(sequence.id)
        elif sequence.choice.constraint is not None:
            sequence.choice.constraint.prepare()
        done.sampled.append(Sampled(sequence.id, token, reason, output.scores))

    def _advance(self, sequence: Sequence, token: int) -> bool:
        """Tells the grammar of a token; whether the output is complete with it. Raises GrammarError."""
        constraint = sequence.choice.constraint
        if constraint is None:
            return False
        constraint.accept(token)
        return constraint.finished

    def _remove(self, request: str) -> bool:
        """False if the request is not known, or has ended."""
        self._core.remove(request)
        known = self._sequences.pop(request, None), self._texts.pop(request, None)
        return any(each is not None for each in known)

    def _end(self, sequence: Sequence, reason: FinishReason, done: StepDone) -> None:
        """Without a new token."""
        self._remove(sequence.id)
        done.ended.append((sequence.id, reason))

    def _fail(self, sequence: Sequence, failed: Failed) -> None:
        """Ends one request."""
        self._remove(sequence.id)
        self._emitter.put(failed)


def not_finite(request: str) -> Failed:
    """How a request fails whose computation went wrong."""
    message = "the model computed a logit that is not a number for this request"
    return Failed(id=request, code="engine_error", message=message)
