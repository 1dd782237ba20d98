"""A runner without an engine: the contract on one processor, with faults to order.

``python tests/fake_runner.py`` serves; ``--probe`` answers like any runner. A token is a byte, or one of two special
ones. The next token is a hash of all tokens before it, so that a request that is continued elsewhere, its output
appended to its prompt, goes on with the same tokens. Above temperature 0 it also depends on (seed, position).
"""

import os
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO, NoReturn

import numpy as np
from pydantic import ValidationError

from exo.worker.admission import length_limit, refusal, resume
from exo.worker.messages import (
    Cancel,
    Capabilities,
    Command,
    Delta,
    Deltas,
    Failed,
    Finished,
    FinishReason,
    Generate,
    Heartbeat,
    Load,
    Message,
    PrefillProgress,
    Probe,
    Shutdown,
    Status,
    Text,
    Usage,
)
from exo.worker.randomness import uniforms
from exo.worker.text import TextStream
from exo.worker.wire import describe, encode, read_commands, take_protocol_stream

COMMAND = (sys.executable, os.path.abspath(__file__))

BOS, EOS = 256, 257
SPECIAL_TOKENS = {"<bos>": BOS, "<eos>": EOS}
ALPHABET = "etaoin shrdlu"


class Options(Message):
    """The card's engine table. Counts of tokens are of the whole process, not of one request."""

    slots: int = 4
    n_ctx: int = 4096
    chunk: int = 256
    """Prompt tokens that one step prefills."""
    step_seconds: float = 0.0
    load_steps: int = 2
    load_gate: str = ""
    """A FIFO: loading goes on once somebody has opened it for writing."""
    fail_load: str = ""
    eos_after: int | None = None
    """Output tokens of one request before the end-of-generation token."""
    die_after: int | None = None
    """Tokens until the process ends by ``die_with``: an exit code, or minus a signal's number."""
    die_with: int = -signal.SIGKILL
    die_at: int | None = None
    """Like ``die_after``, by the output of one request, whoever generated it: a replay dies there again."""
    say_after: int | None = None
    """Tokens until ``say`` is written to the protocol stream as it stands."""
    say: str = ""
    ignore_shutdown: bool = False
    """Also ignores the end of its input, and SIGTERM."""
    stderr_lines: int = 0
    log_commands: bool = False
    chat_template: str | None = None


@dataclass(slots=True)
class FakeSequence:
    """One request. ``state`` is the hash of prompt and output so far, ``output`` counts what was delivered before."""

    request: Generate
    prompt: list[int]
    text: TextStream
    state: int
    output: int
    processed: int = 0

    @property
    def prefill(self) -> int:
        return len(self.prompt) + len(self.request.delivered)

    def next_token(self, options: Options) -> int:
        if self.output == options.eos_after and not self.request.ignore_eos:
            return EOS
        sampling, choice = self.request.sampling, self.state
        if sampling.temperature > 0:
            choice += int(uniforms(sampling.seed, len(self.prompt) + self.output, np.zeros(1, int))[0] * len(ALPHABET))
        return ord(ALPHABET[choice % len(ALPHABET)])


class Vocabulary:
    def bytes_of(self, token: int) -> bytes:
        return b"" if self.is_eog(token) else bytes([token])

    def is_eog(self, token: int) -> bool:
        return token == EOS


def tokenize(prompt: Sequence[Text | int]) -> list[int]:
    tokens: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            tokens.append(part)
        elif part.special and part.text in SPECIAL_TOKENS:
            tokens.append(SPECIAL_TOKENS[part.text])
        else:
            tokens += part.text.encode()
    return tokens


def hash_tokens(tokens: Sequence[int], state: int = 0) -> int:
    return zlib.crc32(struct.pack(f"<{len(tokens)}H", *tokens), state)


def expected_text(prompt: str, tokens: int) -> str:
    """What greedy decoding answers to ``prompt``."""
    state, text = hash_tokens(tokenize([Text(text=prompt)])), ""
    for _ in range(tokens):
        text += ALPHABET[state % len(ALPHABET)]
        state = hash_tokens([ord(text[-1])], state)
    return text


@dataclass(slots=True)
class FakeRunner:
    protocol: BinaryIO
    commands: SimpleQueue[Command | Failed] = field(default_factory=SimpleQueue[Command | Failed])
    options: Options = field(default_factory=Options)
    capabilities: Capabilities | None = None
    sequences: dict[str, FakeSequence] = field(default_factory=dict[str, FakeSequence])
    """In order of arrival: the first ``slots`` of them run, the others wait."""
    tokens: int = 0
    steps: int = 0
    beat: float = field(default_factory=time.monotonic)

    def emit(self, *messages: Message) -> None:
        self.protocol.write(b"".join(map(encode, messages)))

    def read(self) -> None:
        """The reading thread, which outlives an engine that hangs."""
        for command in read_commands(sys.stdin.buffer):
            if self.options.log_commands:
                print(command.type, getattr(command, "id", ""), file=sys.stderr, flush=True)
            self.commands.put(command)
        self.commands.put(Shutdown())
        if not self.options.ignore_shutdown:
            time.sleep(1.0)  # for what is still to be said; a main thread that hangs says nothing
            os._exit(0)

    def run(self) -> None:
        self.emit(Status(state="Idle"))
        while True:
            self.take_commands()
            if self.sequences:
                self.step()

    def take_commands(self) -> None:
        """All that there are; waits for one if there is nothing to do, but not beyond the next heartbeat."""
        with suppress(Empty):
            if not self.sequences:
                self.take(self.commands.get(timeout=max(0.001, self.beat - time.monotonic())))
            while True:
                self.take(self.commands.get_nowait())
        if time.monotonic() >= self.beat:
            active = min(len(self.sequences), self.options.slots)
            self.emit(Heartbeat(steps=self.steps, active=active, waiting=len(self.sequences) - active))
            self.beat = time.monotonic() + 1.0

    def take(self, command: Command | Failed) -> None:
        match command:
            case Load():
                self.load(command)
            case Generate():
                self.generate(command)
            case Cancel(id=request):
                if request in self.sequences:
                    self.finish(self.sequences[request], "cancelled")
            case Shutdown():
                self.shut_down()
            case Failed():
                self.emit(command)

    def load(self, command: Load) -> None:
        try:
            self.options = options = Options.model_validate(command.table)
        except ValidationError as error:
            self.fail(Failed(code="invalid_request", message=describe(error)[1]))
        if options.ignore_shutdown:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number in range(options.stderr_lines):
            print(f"line {number} of {options.stderr_lines}", file=sys.stderr, flush=True)
        for step in range(options.load_steps):
            self.emit(Status(state="Loading", layers_loaded=step, total_layers=options.load_steps))
        if options.load_gate:
            Path(options.load_gate).read_bytes()
        if options.fail_load:
            self.fail(Failed(code="model_load_failed", message=options.fail_load))
        self.capabilities = Capabilities(
            engine="fake",
            engine_version="1",
            backend=command.backend,
            context_length=options.n_ctx,
            slots=options.slots,
            vocabulary=258,
            chat_template=options.chat_template,
            bos_token="<bos>",
            eos_token="<eos>",
            special_tokens=tuple(SPECIAL_TOKENS),
        )
        self.emit(Status(state="Loaded"), Status(state="Ready", capabilities=self.capabilities))

    def fail(self, failure: Failed) -> NoReturn:
        self.emit(failure)
        os._exit(1)

    def shut_down(self) -> None:
        if self.options.ignore_shutdown:
            return
        self.emit(Status(state="ShuttingDown"))
        for request in self.sequences:
            self.emit(Failed(id=request, code="shutdown", message="the runner is shutting down"))
        self.emit(Status(state="Shutdown"))
        os._exit(0)

    def generate(self, request: Generate) -> None:
        prompt = tokenize(request.prompt)
        if self.capabilities is None:
            self.emit(Failed(id=request.id, code="invalid_request", message="the model is not loaded yet"))
            return
        if refused := refusal(request, prompt, self.capabilities.vocabulary, self.options.n_ctx):
            self.emit(refused)
            return
        if not self.sequences:
            self.emit(Status(state="Running"))
        limit = length_limit(request, len(prompt), self.options.n_ctx)
        resumed = resume(request, len(prompt), limit, Vocabulary())
        state = hash_tokens([*prompt, *request.delivered])
        sequence = FakeSequence(request, prompt, resumed.text, state, len(request.delivered))
        self.sequences[request.id] = sequence
        self.emit(PrefillProgress(id=request.id, processed=0, total=sequence.prefill))
        if resumed.ended is not None:
            self.finish(sequence, resumed.ended)

    def step(self) -> None:
        time.sleep(self.options.step_seconds)
        self.steps += 1
        running = list(self.sequences.values())[: self.options.slots]
        prefilling = [sequence for sequence in running if sequence.processed < sequence.prefill]
        for sequence in prefilling:
            total = sequence.prefill
            sequence.processed = min(total, sequence.processed + self.options.chunk)
            self.emit(PrefillProgress(id=sequence.request.id, processed=sequence.processed, total=total))
        deltas: list[Delta] = []
        ends: list[tuple[FakeSequence, FinishReason]] = []
        for sequence in (each for each in running if each not in prefilling):
            deltas.append(delta := self.decode(sequence))
            if reason := self.reason(sequence, delta.tokens[0]):
                ends.append((sequence, reason))
        if deltas:
            self.emit(Deltas(items=tuple(deltas)))
        for sequence, reason in ends:
            self.finish(sequence, reason)
        self.misbehave()

    def decode(self, sequence: FakeSequence) -> Delta:
        token = sequence.next_token(self.options)
        sequence.state = hash_tokens([token], sequence.state)
        sequence.output += 1
        self.tokens += 1
        text = "" if token == EOS else sequence.text.push(bytes([token]))
        return Delta(id=sequence.request.id, tokens=(token,), text=text)

    def reason(self, sequence: FakeSequence, token: int) -> FinishReason | None:
        if token == EOS or sequence.text.stopped_by is not None:
            return "stop"
        full = len(sequence.prompt) + sequence.output >= self.options.n_ctx
        return "length" if full or sequence.output == sequence.request.max_tokens else None

    def finish(self, sequence: FakeSequence, reason: FinishReason) -> None:
        request = sequence.request.id
        del self.sequences[request]
        text = sequence.text.finish()
        stop = sequence.text.stopped_by
        usage = Usage(prompt_tokens=len(sequence.prompt), completion_tokens=sequence.output)
        self.emit(Finished(id=request, reason="stop" if stop else reason, usage=usage, text=text, stop=stop))
        if not self.sequences:
            self.emit(Status(state="Ready"))

    def misbehave(self) -> None:
        options = self.options
        if options.say_after is not None and self.tokens >= options.say_after:
            self.protocol.write(options.say.encode())
        output = max((sequence.output for sequence in self.sequences.values()), default=0)
        due = options.die_after is not None and self.tokens >= options.die_after
        if due or (options.die_at is not None and output >= options.die_at):
            print("the fake runner dies as ordered", file=sys.stderr, flush=True)
            if options.die_with < 0:
                os.kill(os.getpid(), -options.die_with)
            os._exit(options.die_with)


def main() -> None:
    if sys.argv[1:] == ["--probe"]:
        print(Probe(installed=True, engine="fake", version="1", backends=("LlamaCppCpu",)).model_dump_json())
        return
    runner = FakeRunner(take_protocol_stream())
    threading.Thread(target=runner.read, daemon=True).start()
    runner.run()


if __name__ == "__main__":
    main()
