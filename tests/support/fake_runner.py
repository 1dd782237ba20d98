"""A runner without an engine, for the model of ``fake_model.py``: it speaks the protocol and has faults on demand."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from pydantic import ValidationError

from exo.worker.protocol.commands import (
    Cancel,
    Command,
    Cores,
    Embed,
    Estimate,
    Generate,
    Load,
    Rank,
    Shutdown,
    Text,
    Tokenize,
)
from exo.worker.protocol.events import (
    Capabilities,
    CpuUse,
    Delta,
    Deltas,
    Embedded,
    Estimated,
    Failed,
    Finished,
    FinishReason,
    Heartbeat,
    LoadOption,
    PrefillProgress,
    Ranked,
    Status,
    Tokenized,
    Usage,
)
from exo.worker.protocol.messages import LINE_BYTES, Message
from exo.worker.protocol.validation import describe
from exo.worker.protocol.wire import encode, read_commands, take_protocol_stream
from exo.worker.runner_common.load_effort import effort
from exo.worker.runner_common.request_checks import (
    input_refusal,
    length_limit,
    picture_refusal,
    refusal,
    resume,
    tokenized,
    within,
)
from tests.support.fake_model import (
    EOS,
    SPECIAL_TOKENS,
    FakeSequence,
    Vocabulary,
    hash_tokens,
    logprobs_of,
    prompt_logprobs_of,
    score_of,
    tokenize,
    vector_of,
)
from tests.support.fake_options import CONTEXTS, FakeOptions

if TYPE_CHECKING:
    from exo.worker.runner_common.constraint import Constraint
    from tests.support.fake_constraints import FakeConstraints

COMMAND = (sys.executable, "-m", "tests.support.fake_program")


PROCESS_BYTES = 64 << 20
"""About as much memory as the process has."""


@dataclass(slots=True)
class FakeRunner:
    protocol: BinaryIO
    commands: SimpleQueue[Command | Failed] = field(default_factory=SimpleQueue[Command | Failed])
    options: FakeOptions = field(default_factory=FakeOptions)
    capabilities: Capabilities | None = None
    sequences: dict[str, FakeSequence] = field(default_factory=dict[str, FakeSequence])
    """In order of arrival; the first ``slots`` run, the others wait."""
    constraints: "FakeConstraints | None" = None
    questions: dict[str, Embed | Rank] = field(default_factory=dict[str, Embed | Rank])
    """In order of arrival; each step computes a chunk of the first."""
    computed: int = 0
    """Tokens of the first question that have been computed."""
    tokens: int = 0
    steps: int = 0
    cpu: CpuUse | None = None
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
            time.sleep(1.0)  # for the last events; a main thread that hangs sends none
            os._exit(0)

    def keep_beating(self) -> None:
        """Sends the heartbeat from another thread until the model is loaded."""

        def beat() -> None:
            while self.capabilities is None or self.options.hang == "request":
                cpu_seconds, bytes_read = effort()
                self.emit(Heartbeat(steps=0, active=0, waiting=0, cpu_seconds=cpu_seconds, bytes_read=bytes_read))
                time.sleep(0.1)

        threading.Thread(target=beat, daemon=True).start()

    def hang(self) -> NoReturn:
        self.keep_beating()
        while True:
            if not self.options.hang_computing:
                time.sleep(0.1)

    def run(self) -> None:
        self.emit(Status(state="Idle"))
        while True:
            self.take_commands()
            if self.sequences or self.questions:
                self.step()

    def take_commands(self) -> None:
        """Takes all that have come; when idle, waits for one until the next heartbeat is due."""
        with suppress(Empty):
            if not self.sequences and not self.questions:
                self.take(self.commands.get(timeout=max(0.001, self.beat - time.monotonic())))
            while True:
                self.take(self.commands.get_nowait())
        if time.monotonic() >= self.beat:
            requests = len(self.sequences) + len(self.questions)
            active = min(requests, self.options.slots)
            self.emit(Heartbeat(steps=self.steps, active=active, waiting=requests - active, cpu=self.cpu))
            self.beat = time.monotonic() + 1.0

    def take(self, command: Command | Failed) -> None:
        asks = isinstance(command, Generate | Embed | Tokenize)
        if asks and self.capabilities is not None and (unseen := picture_refusal(command, self.capabilities)):
            self.emit(unseen)
            return
        match command:
            case Estimate(load=load):
                self.estimate(load)
            case Load():
                self.load(command)
            case Generate():
                self.generate(command)
            case Embed() | Rank():
                self.ask(command)
            case Tokenize():
                self.tokenize(command)
            case Cancel(id=request):
                if request in self.sequences:
                    self.finish(self.sequences[request], "cancelled")
                elif request in self.questions:
                    usage = Usage(prompt_tokens=0, completion_tokens=0)
                    self.answer(Finished(id=request, reason="cancelled", usage=usage))
            case Cores(count=count):
                self.cpu = CpuUse(threads=count, reason="as it was told", delay=0, slowdown=1)
            case Shutdown():
                self.shut_down()
            case Failed():
                self.emit(command)

    def read_options(self, command: Load) -> FakeOptions:
        try:
            return FakeOptions.model_validate(command.table)
        except ValidationError as error:
            self.fail(Failed(code="invalid_request", message=describe(error)[1]))

    def estimate(self, command: Load) -> None:
        self.options = options = self.read_options(command)
        if options.hang == "estimate":
            self.hang()

        def choice(n_ctx: int) -> LoadOption:
            later = options.memory + options.memory_per_token * n_ctx
            settings = {} if n_ctx == options.n_ctx else {"n_ctx": n_ctx}
            return LoadOption(
                settings=settings, host=PROCESS_BYTES + later, devices=options.on_devices, later_host=later
            )

        if options.n_ctx == 0:
            choices = tuple(choice(n_ctx) for n_ctx in CONTEXTS)
            self.emit(Estimated(choices=choices, enough=1))
        else:
            remedies = tuple(choice(n_ctx) for n_ctx in CONTEXTS if n_ctx < options.n_ctx)
            self.emit(Estimated(choices=(choice(options.n_ctx),), remedies=remedies))

    def load(self, command: Load) -> None:
        self.options = options = self.read_options(command)
        if options.ignore_shutdown:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number in range(options.stderr_lines):
            print(f"line {number} of {options.stderr_lines}", file=sys.stderr, flush=True)
        if options.load_step_seconds:
            self.keep_beating()
        for step in range(options.load_steps):
            self.emit(Status(state="Loading", layers_loaded=step, total_layers=options.load_steps))
            time.sleep(options.load_step_seconds)
        if options.hang == "load":
            self.hang()
        if options.load_gate:
            Path(options.load_gate).read_bytes()
        if options.template_file and not Path(options.template_file).exists():
            self.fail(Failed(code="model_load_failed", message=f"{options.template_file}: no such file"))
        if options.fail_load:
            self.fail(Failed(code="model_load_failed", message=options.fail_load))
        self.capabilities = Capabilities(
            engine="fake",
            engine_version="1",
            backend=command.backend,
            context_length=options.n_ctx,
            slots=options.slots,
            vocabulary=258,
            grammar=True,
            logprobs=True,
            embeddings=options.embeddings,
            rerank=options.rerank,
            vision=options.mmproj is not None,
            chat_template=Path(options.template_file).read_text() if options.template_file else options.chat_template,
            bos_token="<bos>",
            eos_token="<eos>",
            special_tokens=tuple(SPECIAL_TOKENS),
            special_ids=tuple(SPECIAL_TOKENS.values()),
        )
        self.emit(Status(state="Loaded"), Status(state="Ready", capabilities=self.capabilities))

    def fail(self, failure: Failed) -> NoReturn:
        self.emit(failure)
        os._exit(1)

    def shut_down(self) -> None:
        if self.options.ignore_shutdown:
            return
        self.emit(Status(state="ShuttingDown"))
        for request in (*self.sequences, *self.questions):
            self.emit(Failed(id=request, code="shutdown", message="the runner is shutting down"))
        self.emit(Status(state="Shutdown"))
        os._exit(0)

    def generate(self, request: Generate) -> None:
        if self.options.hang == "request":
            self.hang()
        prompt = tokenize(request.prompt)
        if self.capabilities is None:
            self.emit(Failed(id=request.id, code="invalid_request", message="the model is not loaded yet"))
            return
        if refused := refusal(request, prompt, self.capabilities):
            self.emit(refused)
            return
        limit = length_limit(request, len(prompt), self.options.n_ctx)
        resumed = resume(request, len(prompt), limit, Vocabulary())
        constraint = self.constraint(request) if resumed.ended is None else None
        if isinstance(constraint, Failed):
            self.emit(constraint)
            return
        self.begin()
        state = hash_tokens([*prompt, *request.delivered])
        sequence = FakeSequence(request, prompt, resumed.text, state, len(request.delivered), constraint)
        self.sequences[request.id] = sequence
        self.emit(PrefillProgress(id=request.id, processed=0, total=sequence.prefill))
        if resumed.ended is not None:
            self.finish(sequence, resumed.ended)
        elif constraint is not None and constraint.finished:
            self.finish(sequence, "stop")

    def constraint(self, request: Generate) -> "Constraint | Failed | None":
        if request.grammar is None and request.reasoning is None:
            return None
        if self.constraints is None:
            from tests.support.fake_constraints import FakeConstraints

            self.constraints = FakeConstraints()
        return self.constraints.of(request)

    def begin(self) -> None:
        """Reports the state before the first request is added."""
        if not self.sequences and not self.questions:
            self.emit(Status(state="Running"))

    def end(self, terminal: Embedded | Ranked | Finished) -> None:
        """Reports the end of a request and, in the same write, the state after the last one."""
        idle = not self.sequences and not self.questions
        self.emit(terminal, *([Status(state="Ready")] if idle else []))

    def ask(self, request: Embed | Rank) -> None:
        tokens = self.tokens_of(request)
        if self.capabilities is None:
            self.emit(Failed(id=request.id, code="invalid_request", message="the model is not loaded yet"))
            return
        if isinstance(request, Embed):
            tokens = within(request, tokens, self.options.n_ctx, ())
            request = request.model_copy(update={"prompt": tuple(tokens)})
        if refused := input_refusal(request, tokens, self.capabilities, self.options.n_ctx):
            self.emit(refused)
            return
        self.begin()
        self.questions[request.id] = request
        self.emit(PrefillProgress(id=request.id, processed=0, total=len(tokens)))

    def tokenize(self, request: Tokenize) -> None:
        if self.capabilities is None:
            self.emit(Failed(id=request.id, code="invalid_request", message="the model is not loaded yet"))
        elif self.options.overlong_for and request.prompt == (Text(text=self.options.overlong_for, special=True),):
            self.protocol.write(encode(Tokenized(id=request.id, tokens=(), bytes=()))[:-3] + b" " * LINE_BYTES)
        else:
            self.emit(*tokenized(request, tokenize(request.prompt), self.capabilities.vocabulary, Vocabulary()))

    def tokens_of(self, request: Embed | Rank) -> list[int]:
        texts = request.prompt if isinstance(request, Embed) else (Text(text=request.query + request.document),)
        return tokenize(texts)

    def answer_next(self) -> None:
        request = next(iter(self.questions.values()), None)
        if request is None:
            return
        tokens = self.tokens_of(request)
        self.computed += self.options.chunk
        if self.computed < len(tokens):
            return
        self.tokens += 1
        self.misbehave()
        usage = Usage(prompt_tokens=len(tokens), completion_tokens=0)
        match request:
            case Embed():
                self.answer(Embedded(id=request.id, vector=vector_of(tokens), usage=usage))
            case Rank():
                self.answer(Ranked(id=request.id, score=score_of(request.query, request.document), usage=usage))

    def answer(self, terminal: Embedded | Ranked | Finished) -> None:
        del self.questions[terminal.id]
        self.computed = 0
        self.end(terminal)

    def step(self) -> None:
        time.sleep(self.options.step_seconds)
        self.steps += 1
        self.answer_next()
        running = list(self.sequences.values())[: self.options.slots]
        prefilling = [sequence for sequence in running if sequence.processed < sequence.prefill]
        for sequence in prefilling:
            total = sequence.prefill
            sequence.processed = min(total, sequence.processed + self.options.chunk)
            self.emit(PrefillProgress(id=sequence.request.id, processed=sequence.processed, total=total))
            if sequence.processed == total:
                self.prefilled(sequence)
        deltas: list[Delta] = []
        ends: list[tuple[FakeSequence, FinishReason]] = []
        for sequence in (each for each in running if each not in prefilling):
            if sequence.request.ignore_eos and self.only_an_end_is_left(sequence):
                ends.append((sequence, "stop"))
                continue
            deltas.append(delta := self.decode(sequence))
            if reason := self.reason(sequence, delta.tokens[0]):
                ends.append((sequence, reason))
        if deltas:
            self.emit(Deltas(items=tuple(deltas)))
        for sequence, reason in ends:
            self.finish(sequence, reason)
        self.misbehave()

    def prefilled(self, sequence: FakeSequence) -> None:
        request = sequence.request
        if request.prompt_logprobs is not None:
            self.emit(*prompt_logprobs_of(request, sequence.prompt))
        if request.max_tokens == 0:
            self.finish(sequence, "length")

    def only_an_end_is_left(self, sequence: FakeSequence) -> bool:
        if sequence.constraint is None:
            return False
        allowed = sequence.constraint.mask()
        return bool(allowed[EOS]) and not allowed[:EOS].any()

    def decode(self, sequence: FakeSequence) -> Delta:
        request = sequence.request
        token = sequence.next_token(self.options.eos_after, self.options.answer.encode())
        logprobs = () if request.logprobs is None else (logprobs_of(sequence.state, token, request.logprobs),)
        sequence.state = hash_tokens([token], sequence.state)
        sequence.output += 1
        self.tokens += 1
        text = sequence.text.take(token, Vocabulary(), show_special=request.show_special)
        if token != EOS and sequence.constraint is not None:
            sequence.constraint.accept(token)
        return Delta(id=request.id, tokens=(token,), text=text, logprobs=logprobs)

    def reason(self, sequence: FakeSequence, token: int) -> FinishReason | None:
        if token == EOS or sequence.text.stopped:
            return "stop"
        if sequence.constraint is not None and sequence.constraint.finished:
            return "stop"
        full = len(sequence.prompt) + sequence.output >= self.options.n_ctx
        return "length" if full or sequence.output == sequence.request.max_tokens else None

    def finish(self, sequence: FakeSequence, reason: FinishReason) -> None:
        request = sequence.request.id
        del self.sequences[request]
        text = sequence.text.finish()
        stop = sequence.text.stopped_by
        usage = Usage(prompt_tokens=len(sequence.prompt), completion_tokens=sequence.output)
        self.end(Finished(id=request, reason="stop" if stop else reason, usage=usage, text=text, stop=stop))

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
    runner = FakeRunner(take_protocol_stream())
    threading.Thread(target=runner.read, daemon=True).start()
    runner.run()
