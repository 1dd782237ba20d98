"""The generate loop. One thread loads the model and runs it; no other touches vLLM."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from exo.worker.protocol.events import Failed, FinishReason
from exo.worker.runner_common.commands import Commands, TextJob, answer
from exo.worker.runner_common.grammar.guided_decoding import GrammarError, grammar_failure
from exo.worker.runner_common.hf_tokenizer import TransformersTokenizer
from exo.worker.runner_common.output_processor import Emitter, PromptScored, StepDone
from exo.worker.runner_common.sequence import append, not_finite
from exo.worker.runner_vllm.sequence import VllmSequence

if TYPE_CHECKING:
    from exo.worker.runner_vllm.vllm_edge import Core, Output


class VllmEngine:
    """Gives sequences and texts to vLLM, which batches them, and hands each step's results to the emitter."""

    def __init__(self, core: "Core", tokenizer: TransformersTokenizer, emitter: Emitter) -> None:
        self._core = core
        self._tokenizer = tokenizer
        self._emitter = emitter
        self._sequences: dict[str, VllmSequence] = {}
        self._texts: dict[str, TextJob] = {}
        self.commands: Commands[VllmSequence] = Commands(
            emitter, add=self._add, add_text=self._add_text, remove=self._remove
        )

    def counts(self) -> tuple[int, int, int]:
        """Returns the steps so far, the sequences and texts in work, and those that wait. Safe in any thread."""
        return self._core.steps, *self._core.counts

    def run(self) -> None:
        """Computes steps until the commands say ``Shutdown``. Raises what vLLM raises."""
        while self.commands.handle(wait=not (self._sequences or self._texts)):
            if self._sequences or self._texts:
                self._step()

    def _add(self, sequence: VllmSequence) -> None:
        self._sequences[sequence.id] = sequence
        self._core.add(sequence)

    def _add_text(self, job: TextJob) -> None:
        self._texts[job.id] = job
        self._core.add_text(job)

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
        """Reports the progress of prompts."""
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

    def _answer(self, text: TextJob, pooled: npt.NDArray[np.float64] | None) -> None:
        """Answers a text; ``pooled`` is None if vLLM has given it up."""
        self._remove(text.id)
        answered = not_finite(text.id) if pooled is None else answer(text, pooled)
        self._emitter.put(answered)
        if isinstance(answered, Failed):
            self._core.clear_unused()

    def _take(self, sequence: VllmSequence, output: "Output", done: StepDone) -> None:
        """Adds a step's results to their sequence, and ends the sequence after the last one."""
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

    def _append(self, sequence: VllmSequence, output: "Output", token: int, done: StepDone) -> None:
        try:
            sampled = append(sequence, token, self._tokenizer, output.scores)
        except GrammarError as error:
            self._fail(sequence, grammar_failure(sequence.id, error))
            return
        if sampled.reason is not None:
            self._remove(sequence.id)
        done.sampled.append(sampled)

    def _remove(self, request: str) -> bool:
        """Drops a request; false if it is unknown or has ended."""
        self._core.remove(request)
        known = self._sequences.pop(request, None), self._texts.pop(request, None)
        return any(each is not None for each in known)

    def _end(self, sequence: VllmSequence, reason: FinishReason, done: StepDone) -> None:
        """Ends a sequence without a new token."""
        self._remove(sequence.id)
        done.ended.append((sequence.id, reason))

    def _fail(self, sequence: VllmSequence, failed: Failed) -> None:
        """Ends one request."""
        self._remove(sequence.id)
        self._emitter.put(failed)
