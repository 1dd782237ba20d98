"""Drives a runner by hand, as a program that reads and writes JSON lines."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from exo.worker.protocol.commands import Cancel, Generate, Load, Request, SamplingParams, Shutdown, Text
from exo.worker.protocol.events import (
    Capabilities,
    Deltas,
    Embedded,
    Estimated,
    Event,
    Failed,
    Finished,
    PrefillProgress,
    PromptLogprobs,
    Ranked,
    Status,
    Tokenized,
    TokenLogprobs,
)
from exo.worker.protocol.messages import Message
from exo.worker.protocol.wire import decode_event, encode

DEADLINE_SECONDS = 300.0
"""How long a test waits for an event that must come; reached only if something is broken."""


@dataclass(slots=True)
class Result:
    """All events of one request."""

    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    pieces: list[str] = field(default_factory=list[str])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list[PromptLogprobs])
    """At most one, joined from its parts."""
    parts: int = 0
    """Parts of an answer that came in several."""
    tokenized_parts: list[Tokenized] = field(default_factory=list[Tokenized])
    prefill: list[PrefillProgress] = field(default_factory=list[PrefillProgress])
    end: Finished | Embedded | Ranked | Tokenized | Failed | None = None
    after_end: list[Event] = field(default_factory=list[Event])

    def add_prompt_logprobs(self, part: PromptLogprobs) -> None:
        before = self.prompt_logprobs[0].items if self.prompt_logprobs else ()
        assert part.start == len(before)
        assert self.tokens == []
        self.prompt_logprobs = [part.model_copy(update={"start": 0, "items": before + part.items})]
        self.parts += 1

    def add_tokenized(self, part: Tokenized) -> None:
        """Joins the last part with those before."""
        self.tokenized_parts.append(part)
        self.parts += 1
        if not part.more:
            tokens = tuple(token for each in self.tokenized_parts for token in each.tokens)
            spelt = tuple(text for each in self.tokenized_parts for text in each.bytes)
            self.end = part.model_copy(update={"tokens": tokens, "bytes": spelt})

    @property
    def finished(self) -> Finished:
        assert isinstance(self.end, Finished), self.end
        return self.end

    @property
    def embedded(self) -> Embedded:
        assert isinstance(self.end, Embedded), self.end
        return self.end

    @property
    def ranked(self) -> Ranked:
        assert isinstance(self.end, Ranked), self.end
        return self.end

    @property
    def tokenized(self) -> Tokenized:
        assert isinstance(self.end, Tokenized), self.end
        return self.end

    @property
    def failed(self) -> Failed:
        assert isinstance(self.end, Failed), self.end
        return self.end


class Program:
    """One runner process. Events are sorted by request as they are read; ``until`` reads on to a condition."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.results: dict[str, Result] = {}
        self.states: list[str] = []
        self.capabilities: Capabilities | None = None
        self.failure: Failed | None = None
        self.estimated: Estimated | None = None
        self.heartbeats = 0
        self.longest = 0
        """Bytes of the longest line."""
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.longest = max(self.longest, len(line))
            self._events.put(decode_event(line))
        self._events.put(None)

    def write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def send(self, *messages: Message) -> None:
        self.write(b"".join(encode(message) for message in messages))

    def until(self, done: Callable[[], bool]) -> None:
        """Reads events until ``done()``; fails if the runner ends or stops sending first."""
        while not done():
            event = self._events.get(timeout=DEADLINE_SECONDS)
            assert event is not None, f"the runner ended: {self.failure}"
            self._sort(event)

    def drain(self) -> int:
        """Reads to the end of the stream and returns the exit code."""
        while (event := self._events.get(timeout=DEADLINE_SECONDS)) is not None:
            self._sort(event)
        return self.process.wait(DEADLINE_SECONDS)

    def _sort(self, event: Event) -> None:
        match event:
            case Status():
                self.states.append(event.state)
                self.capabilities = event.capabilities or self.capabilities
            case Estimated():
                self.estimated = event
            case Failed(id=None):
                self.failure = event
            case Deltas():
                for delta in event.items:
                    result = self._open(delta.id, event)
                    result.tokens += delta.tokens
                    result.text += delta.text
                    result.pieces.append(delta.text)
                    result.logprobs += delta.logprobs
            case PromptLogprobs():
                self._open(event.id, event).add_prompt_logprobs(event)
            case PrefillProgress():
                self._open(event.id, event).prefill.append(event)
            case Tokenized():
                self._open(event.id, event).add_tokenized(event)
            case Finished() | Embedded() | Ranked() | Failed(id=str()):
                result = self._open(event.id or "", event)
                result.text += event.text if isinstance(event, Finished) else ""
                result.end = event
            case _:
                self.heartbeats += 1

    def _open(self, request: str, event: Event) -> Result:
        result = self.results.setdefault(request, Result())
        if result.end is not None:
            result.after_end.append(event)
        return result

    def load(self, load: Load) -> Capabilities:
        """Loads a model and waits until it is ready."""
        self.send(load)
        self.until(lambda: self.capabilities is not None)
        assert self.capabilities is not None
        return self.capabilities

    def ended(self, *requests: str) -> Callable[[], bool]:
        """A condition for ``until``: all of these requests have ended."""
        return lambda: all(r in self.results and self.results[r].end is not None for r in requests)

    def generate(self, *requests: Request) -> list[Result]:
        """Sends requests together and waits for all to end."""
        self.send(*requests)
        ids = [request.id for request in requests]
        self.until(self.ended(*ids))
        return [self.results[name] for name in ids]

    def cancel(self, request: str) -> None:
        self.send(Cancel(id=request))

    def shutdown(self) -> int:
        self.send(Shutdown())
        return self.drain()


def runner_command(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def names() -> Iterator[str]:
    """Request ids that no other request of this test run has."""
    while True:
        yield f"request-{os.urandom(6).hex()}"


def ask(
    name: str,
    prompt: str | Sequence[int] = "once upon a time",
    *,
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int | None = 16,
    stop: Sequence[str] = (),
    ignore_eos: bool = True,
    **sampling: object,
) -> Generate:
    """A request with the tests' usual settings: greedy, 16 tokens, no end-of-generation."""
    params = SamplingParams.model_validate({"seed": seed, "temperature": temperature, **sampling})
    parts = (Text(text=prompt),) if isinstance(prompt, str) else tuple(prompt)
    return Generate(
        id=name, prompt=parts, sampling=params, stop=tuple(stop), max_tokens=max_tokens, ignore_eos=ignore_eos
    )
