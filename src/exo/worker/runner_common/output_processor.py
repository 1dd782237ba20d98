"""Turns tokens into text and events, in a thread of its own, while the engine computes the next step.

The emitter is the only writer of the protocol stream and alone ends requests. Therefore each request gets exactly one
terminal event.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import BinaryIO

from exo.worker.protocol.events import (
    CpuUse,
    Delta,
    Deltas,
    Embedded,
    Failed,
    Finished,
    FinishReason,
    Heartbeat,
    Logprob,
    PrefillProgress,
    PrefixUse,
    PromptLogprobs,
    Ranked,
    Status,
    TokenLogprobs,
    Usage,
)
from exo.worker.protocol.messages import LINE_BYTES, PART_LOGPROBS, Message
from exo.worker.protocol.wire import encode, exit_now
from exo.worker.runner_common.detokenizer import TextStream, Vocabulary
from exo.worker.runner_common.load_effort import effort
from exo.worker.runner_common.request_checks import Resumed
from exo.worker.runner_common.sequence import Sampled, Scores

HEARTBEAT_SECONDS = 1.0
LEAST_LOGPROB = -9999.0
PART_DELTAS = 256
"""The most deltas in one message; each may have log-probabilities."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request is valid. It is queued, unless the tokens delivered before have ended it."""

    id: str
    n_prompt: int
    n_delivered: int
    resumed: Resumed
    show_special: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A request ends before it was accepted."""

    failure: Failed


@dataclass(frozen=True, slots=True)
class TextAccepted:
    """A request for a vector or a score is valid and queued."""

    id: str
    n_prompt: int


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Tokens of a prompt from index ``start`` on and their scores. The prompt's first token has none."""

    id: str
    start: int
    tokens: list[int]
    scores: list[Scores | None]

    @classmethod
    def following(cls, request: str, tokens: list[int], told: int, found: list[Scores]) -> "PromptScored":
        """Adds the tokens to the scores ``found``, which follow the first ``told`` tokens of the prompt."""
        scores: list[Scores | None] = [*found]
        if not told:
            scores.insert(0, None)
        return cls(request, told, tokens[told : told + len(scores)], scores)


@dataclass(frozen=True, slots=True)
class StepDone:
    """The results of one step, by request id."""

    cached: list[tuple[str, int]]
    """Sequences that entered a slot, and their tokens found in the KV cache."""
    processed: list[tuple[str, int]]
    """Sequences in prefill, and their tokens computed so far."""
    sampled: list[Sampled] = field(default_factory=list[Sampled])
    prompts: list[PromptScored] = field(default_factory=list[PromptScored])
    ended: list[tuple[str, FinishReason]] = field(default_factory=list[tuple[str, FinishReason]])
    """Sequences that ended without a new token."""
    drafted: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    """Sequences with drafts, the tokens of the draft, and how many of them were right."""
    diverged: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Sequences whose prompts repeat a cached one after a difference, and the place of the difference."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The engine has dropped a request."""

    id: str


Item = Accepted | TextAccepted | Refused | StepDone | Cancelled | Message


@dataclass(slots=True)
class RequestOutput:
    """The output of one request so far."""

    text: TextStream
    n_prompt: int
    show_special: bool = False
    n_delivered: int = 0
    n_cached: int = 0
    n_tokens: int = 0
    """Tokens generated, by this runner or before."""
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def n_prefill(self) -> int:
        """Tokens that are known before this runner generates the first one."""
        return self.n_prompt + self.n_delivered

    def usage(self) -> Usage:
        """Returns the token counts so far."""
        cached = min(self.n_cached, self.n_prompt)
        return Usage(
            prompt_tokens=self.n_prompt,
            completion_tokens=self.n_tokens,
            cached_tokens=cached,
            drafted_tokens=self.n_drafted,
            accepted_tokens=self.n_accepted,
        )


@dataclass(slots=True)
class Emitter:
    """Writes events and heartbeats. The front end sets the attributes without an underscore when a model is loaded."""

    protocol: BinaryIO
    vocabulary: Vocabulary = field(init=False)
    stop_engine: Callable[[str], None] = field(init=False)
    """Makes the engine drop the request with this id, which has ended."""
    counts: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)
    """Returns the steps so far, the requests in work and those that wait."""
    cpu_use: Callable[[], CpuUse | None] = lambda: None
    prefix_use: Callable[[], PrefixUse | None] = lambda: None
    _queue: SimpleQueue[Item | None] = field(default_factory=SimpleQueue[Item | None])
    _outputs: dict[str, RequestOutput] = field(default_factory=dict[str, RequestOutput])
    _leaving: bool = False
    _ready: bool = False
    _thread: threading.Thread = field(init=False)

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="emitter", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queues an item, from any thread; never blocks."""
        self._queue.put(item)

    def close(self) -> None:
        """Writes all queued items, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        beat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, beat - time.monotonic()))
            except Empty:
                self._write([self._heartbeat()])
                beat = time.monotonic() + HEARTBEAT_SECONDS
                continue
            if item is None:
                return
            self._write(self._messages(item))

    def _heartbeat(self) -> Heartbeat:
        steps, active, waiting = self.counts()
        if self._ready:
            own = self.cpu_use(), self.prefix_use()
            return Heartbeat(steps=steps, active=active, waiting=waiting, cpu=own[0], prefixes=own[1])
        cpu_seconds, bytes_read = effort()
        return Heartbeat(steps=steps, active=active, waiting=waiting, cpu_seconds=cpu_seconds, bytes_read=bytes_read)

    def _write(self, messages: list[Message]) -> None:
        if messages:
            self.protocol.write(b"".join(map(self._line, messages)))

    def _line(self, message: Message) -> bytes:
        """Encodes a message. Ends the runner if it is too long, as ``Ready`` with a huge chat template may be."""
        line = encode(message)
        if len(line) > LINE_BYTES:
            said = f"the runner's message {type(message).__name__} takes {len(line)} bytes, of at most {LINE_BYTES}"
            code = "model_load_failed" if isinstance(message, Status) else "engine_error"
            self.protocol.write(encode(Failed(code=code, message=said)))
            exit_now(1)
        return line

    def _messages(self, item: Item) -> list[Message]:
        match item:
            case Accepted():
                return self._begin(item)
            case TextAccepted():
                return self._open(item.id, RequestOutput(TextStream(()), item.n_prompt))
            case StepDone():
                return self._step(item)
            case Cancelled():
                return self._finish(item.id, "cancelled")
            case Refused():
                return self._refuse(item.failure)
            case Failed(id=str(request)) | Embedded(id=request) | Ranked(id=request):
                return self._end(request, item)
            case Status(state="ShuttingDown"):
                self._leaving = True
                return [item]
            case Status(state="Ready"):
                self._ready = True
                return [item]
            case Status(state="Shutdown"):
                return [*self._abandon(), item]
            case _:
                return [item]

    def _begin(self, item: Accepted) -> list[Message]:
        text, n_delivered = item.resumed.text, item.n_delivered
        output = RequestOutput(text, item.n_prompt, item.show_special, n_delivered, n_tokens=n_delivered)
        begins = self._open(item.id, output)
        return begins if item.resumed.ended is None else begins + self._finish(item.id, item.resumed.ended)

    def _open(self, request: str, output: RequestOutput) -> list[Message]:
        """Begins a request; nothing else does."""
        begins: list[Message] = [] if self._outputs else [Status(state="Running")]
        self._outputs[request] = output
        return [*begins, PrefillProgress(id=request, processed=0, total=output.n_prefill)]

    def _step(self, step: StepDone) -> list[Message]:
        for request, cached in step.cached:
            if request in self._outputs:
                self._outputs[request].n_cached = cached
        for request, drafted, accepted in step.drafted:
            if request in self._outputs:
                self._outputs[request].n_drafted += drafted
                self._outputs[request].n_accepted += accepted
        messages: list[Message] = [
            PrefillProgress(id=request, processed=output.n_cached, total=output.n_prefill, diverged_at=at)
            for request, at in step.diverged
            if (output := self._outputs.get(request)) is not None
        ]
        messages += [
            PrefillProgress(id=request, processed=processed, total=self._outputs[request].n_prefill)
            for request, processed in step.processed
            if request in self._outputs
        ]
        messages += [
            part for prompt in step.prompts if prompt.id in self._outputs for part in self._prompt_logprobs(prompt)
        ]
        deltas: list[Delta] = []
        ends: list[Message] = []
        for sampled in step.sampled:
            output = self._outputs.get(sampled.id)
            if output is None:
                continue
            output.n_tokens += 1
            deltas.append(self._delta(sampled, output))
            if output.text.stopped:
                if sampled.reason is None:
                    self.stop_engine(sampled.id)
                ends += self._finish(sampled.id, "stop")
            elif sampled.reason is not None:
                ends += self._finish(sampled.id, sampled.reason)
        messages += [Deltas(items=tuple(deltas[at : at + PART_DELTAS])) for at in range(0, len(deltas), PART_DELTAS)]
        for request, reason in step.ended:
            ends += self._finish(request, reason)
        return messages + ends

    def _delta(self, sampled: Sampled, output: RequestOutput) -> Delta:
        text = output.text.take(sampled.token, self.vocabulary, show_special=output.show_special)
        logprobs = () if sampled.scores is None else (self._logprobs(sampled.token, sampled.scores),)
        return Delta(id=sampled.id, tokens=(sampled.token,), text=text, logprobs=logprobs)

    def _prompt_logprobs(self, prompt: PromptScored) -> list[PromptLogprobs]:
        widest = max((1 + len(scores.top) for scores in prompt.scores if scores is not None), default=1)
        size = max(1, PART_LOGPROBS // widest)
        parts: list[PromptLogprobs] = []
        for at in range(0, len(prompt.tokens), size):
            told = zip(prompt.tokens[at : at + size], prompt.scores[at : at + size], strict=True)
            items = tuple(self._logprobs(*each) for each in told)
            parts.append(PromptLogprobs(id=prompt.id, start=prompt.start + at, items=items))
        return parts

    def _logprobs(self, token: int, scores: Scores | None) -> TokenLogprobs:
        if scores is None:
            return TokenLogprobs(chosen=self._logprob(token, None))
        top = tuple(self._logprob(*each) for each in scores.top)
        return TokenLogprobs(chosen=self._logprob(token, scores.chosen), top=top)

    def _logprob(self, token: int, value: float | None) -> Logprob:
        bounded = None if value is None else max(value, LEAST_LOGPROB)
        return Logprob(token=token, bytes=tuple(self.vocabulary.piece_of(token)), logprob=bounded)

    def _finish(self, request: str, reason: FinishReason) -> list[Message]:
        output = self._outputs.get(request)
        if output is None:  # it has ended already
            return []
        text = output.text.finish()
        stop = output.text.stopped_by
        usage = output.usage()
        return self._end(
            request,
            Finished(id=request, reason="stop" if output.text.stopped else reason, usage=usage, text=text, stop=stop),
        )

    def _refuse(self, failure: Failed) -> list[Message]:
        """Ends a request that was not accepted. A faulty command may also name one that was, and ends that."""
        if failure.id not in self._outputs:
            return [failure]
        self.stop_engine(failure.id)
        return self._end(failure.id, failure)

    def _abandon(self) -> list[Message]:
        """Ends all requests that the engine has left unfinished."""
        requests, self._outputs = self._outputs, {}
        return [Failed(id=each, code="shutdown", message="the runner is shutting down") for each in requests]

    def _end(self, request: str, terminal: Finished | Embedded | Ranked | Failed) -> list[Message]:
        """Ends an accepted request, unless it has ended: the engine may still fail after a stop string."""
        if self._outputs.pop(request, None) is None:
            return []
        return [terminal] if self._outputs or self._leaving else [terminal, Status(state="Ready")]
