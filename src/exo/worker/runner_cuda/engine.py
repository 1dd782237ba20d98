"""The generate loop. One thread runs it, and no other touches the llama.cpp context."""

from dataclasses import dataclass
from queue import Empty, SimpleQueue

from exo.worker.emitter import Cancelled, Emitter, Sampled, StepDone
from exo.worker.messages import Failed, FinishReason
from exo.worker.runner_cuda.llama import Context, Logits
from exo.worker.runner_cuda.sampler import NotFinite
from exo.worker.runner_cuda.scheduler import Scheduler, Step
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Leave:
    """A request that is to end: cancelled, or ended by a stop string, which its client has been ``told`` already."""

    id: str
    told: bool


class Stop:
    """Ends the loop."""


class Engine:
    """Continuous batching over one context.

    A step: take commands, plan, fill the batch, decode, sample every row that is due, hand the tokens to the emitter.
    The emitter makes text of them while the next step is already computing.
    """

    def __init__(self, context: Context, scheduler: Scheduler, tokenizer: Tokenizer, emitter: Emitter) -> None:
        self.commands: SimpleQueue[Sequence | Leave | Stop] = SimpleQueue()
        self.steps = 0
        self._context = context
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._emitter = emitter

    def load(self) -> tuple[int, int, int]:
        """Steps so far, sequences in a slot, sequences waiting. Safe to call from any thread."""
        return self.steps, self._scheduler.n_active, len(self._scheduler.waiting)

    def run(self) -> None:
        """Steps until told to stop; what is then in flight fails with code "shutdown". Raises EngineError."""
        while self._take_commands():
            step = self._scheduler.plan()
            if not step.chunks:
                continue
            n_outputs = self._fill(step)
            self._context.decode(sum(chunk.stop - chunk.start for chunk in step.chunks))
            sampling = self._scheduler.computed(step)
            sampled = self._sample(sampling, self._context.logits(n_outputs)) if sampling else []
            self.steps += 1
            self._emitter.put(
                StepDone(
                    cached=step.started,
                    processed=[(c.sequence.id, c.stop) for c in step.chunks if c.stop <= c.sequence.n_prefill],
                    sampled=sampled,
                )
            )
        for sequence in self._scheduler.sequences():
            self._emitter.put(Failed(id=sequence.id, code="shutdown", message="the runner is shutting down"))

    def _take_commands(self) -> bool:
        """Waits for a command if there is nothing to compute. False to stop."""
        idle = not self._scheduler
        while True:
            try:
                command = self.commands.get(block=idle)
            except Empty:
                return True
            idle = False
            match command:
                case Sequence():
                    self._scheduler.add(command)
                case Leave():
                    if self._scheduler.remove(command.id) is not None and not command.told:
                        self._emitter.put(Cancelled(command.id))
                case Stop():
                    return False

    def _fill(self, step: Step) -> int:
        """Writes the step into the batch; how many of its rows give logits."""
        batch = self._context.batch
        row = n_outputs = 0
        for chunk in step.chunks:
            end = row + chunk.stop - chunk.start
            batch.tokens[row:end] = chunk.sequence.tokens[chunk.start : chunk.stop]
            batch.positions[row:end] = range(chunk.start, chunk.stop)
            batch.slots[row:end] = chunk.sequence.slot
            batch.outputs[row:end] = 0
            if chunk.samples:
                batch.outputs[end - 1] = 1
                n_outputs += 1
            row = end
        return n_outputs

    def _sample(self, sequences: list[Sequence], logits: Logits) -> list[Sampled]:
        """One token for each row of ``logits``, shape (len(sequences), n_vocab)."""
        sampled: list[Sampled] = []
        for sequence, row in zip(sequences, logits, strict=True):
            try:
                token = sequence.sampler.choose(row, len(sequence.tokens))
            except NotFinite:
                self._scheduler.remove(sequence.id)
                message = "the model computed a logit that is not a number for this request"
                self._emitter.put(Failed(id=sequence.id, code="engine_error", message=message))
                continue
            sequence.tokens.append(token)
            sequence.sampler.accept(token)
            is_eog = self._tokenizer.is_eog(token)
            reason: FinishReason | None = None
            if is_eog:
                reason = "stop"
            elif len(sequence.tokens) >= sequence.n_limit:
                reason = "length"
            if reason is not None:
                self._scheduler.remove(sequence.id)
            sampled.append(Sampled(sequence.id, token, reason, is_eog))
        return sampled
