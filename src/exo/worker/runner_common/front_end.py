"""Turns the server's commands into an engine's work. The same for all runners, which pass it their engine's operations.

One thread reads commands, a second tokenizes, a third compiles grammars and a fourth, the engine's, computes. They and
the emitter's thread, which makes text and writes events, share queues only. A ``Cancel`` waits for none of them.
"""

import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import Queue, SimpleQueue
from typing import Generic

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
    Estimated,
    Failed,
    PrefixUse,
    Status,
)
from exo.worker.protocol.wire import exit_now
from exo.worker.runner_common.commands import Commands, SequenceT, TextJob
from exo.worker.runner_common.constraint import Constraint, ReasoningBudget
from exo.worker.runner_common.grammar.guided_decoding import GrammarCompiler, GrammarError, grammar_failure
from exo.worker.runner_common.load_error import LoadError, from_library
from exo.worker.runner_common.main import collect_as_usual
from exo.worker.runner_common.output_processor import Accepted, Emitter, Refused, TextAccepted
from exo.worker.runner_common.pictures import PictureError
from exo.worker.runner_common.request_checks import (
    input_refusal,
    length_limit,
    picture_refusal,
    refusal,
    refused,
    resume,
    tokenized,
    within,
)
from exo.worker.runner_common.tokenizer import Tokenizer

ARRIVED = 16
"""Requests read ahead of the one that is tokenized. Further ones stay in the pipe."""


@dataclass(frozen=True, slots=True)
class Prepared(Generic[SequenceT]):
    """A request whose prompt is encoded."""

    prompt: list[int]
    """Token ids. Those below 0 stand for pictures."""
    new_sequence: Callable[[int, Constraint | None], SequenceT]
    """Makes a sequence of the length at which it ends, and its grammar."""


@dataclass(frozen=True, slots=True)
class LoadedEngine(Generic[SequenceT]):
    """A loaded model, and the operations of its engine that the front end uses."""

    tokenizer: Tokenizer
    capabilities: Capabilities
    longest_text: int
    """Tokens that a text to embed may have."""
    closing: Sequence[int]
    """Control tokens at the end of a text to embed, which truncation keeps."""
    text_tokens: Callable[[Embed | Rank], list[int]]
    """Returns the token ids of a text to embed, or of a query and its document, with the control tokens around them."""
    prepare: Callable[[Generate], "Prepared[SequenceT]"]
    """Encodes the prompt of a request. Raises PictureError."""
    commands: Commands[SequenceT]
    run: Callable[[], None]
    """Computes until ``commands`` has a ``Shutdown``, then frees the model. Called in the thread that has loaded it."""
    counts: Callable[[], tuple[int, int, int]]
    """Returns the steps so far, the requests in work and those that wait. Called from any thread."""
    no_generation: str = ""
    """The reason why the model generates no text, after "model: "; empty if it does."""
    cpu_use: Callable[[], CpuUse | None] = lambda: None
    """Returns how the engine uses the CPU, if it measures that. Called from any thread."""
    prefix_use: Callable[[], PrefixUse | None] = lambda: None
    """Returns what prompts have found in the prefix cache, if the engine counts that. Called from any thread."""


class FrontEnd(Generic[SequenceT]):
    """Serves one runner's commands, from the first to the last."""

    def __init__(
        self,
        emitter: Emitter,
        load: Callable[[Load], LoadedEngine[SequenceT]],
        estimate: Callable[[Estimate], Estimated],
        explain: Callable[[Exception], Failed | None],
    ) -> None:
        """``load`` and ``estimate`` may raise LoadError. ``load`` is called in the engine's thread.

        ``explain`` makes the runner's last event of an exception that the engine's library has raised; None for an
        exception that the library does not raise.
        """
        self._emitter = emitter
        self._load = load
        self._estimate = estimate
        self._explain = explain
        self._engine: LoadedEngine[SequenceT] | None = None
        self._compiler: GrammarCompiler | None = None
        self._closings: dict[str, list[int]] = {}  # the token ids of texts that close reasoning
        self._arrived: Queue[Generate | Embed | Rank | Tokenize | Cancel | Shutdown] = Queue(ARRIVED)
        self._compiling: SimpleQueue[tuple[Generate, Prepared[SequenceT]] | Cancel | Shutdown] = SimpleQueue()
        self._tokenizer_thread = _started("tokenizer", self._tokenize_arrived)
        self._grammar_thread = _started("grammar", self._begin_compiled)
        self._engine_thread: threading.Thread | None = None

    def serve(self, commands: Iterable[Command | Failed]) -> None:
        """Handles commands up to a ``Shutdown`` or their end. A ``Failed`` stands for a line that was no command."""
        for command in commands:
            match command:
                case Estimate():
                    _started("estimate", partial(self._answer_estimate, command))
                case Load() if self._engine_thread is None:
                    self._engine_thread = _started("engine", partial(self._run_engine, command))
                case Load():
                    self._emitter.put(Failed(code="invalid_request", message="a model is loaded already"))
                case Generate() | Embed() | Rank() | Tokenize():
                    self._arrived.put(command)
                case Cancel():
                    self._tell_engine(command)
                    self._arrived.put(command)  # the request may still be in that queue, or in the one for grammars
                case Cores():
                    self._tell_engine(command)
                case Failed():
                    self._emitter.put(Refused(command))
                case Shutdown():
                    self._shut_down(command)
                    return

    def _tell_engine(self, command: Cancel | Cores | Shutdown) -> None:
        if self._engine is not None:
            self._engine.commands.put(command)

    def _answer_estimate(self, command: Estimate) -> None:
        try:
            self._emitter.put(self._estimate(command))
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- a library may raise anything
            self._fail(self._cannot_load(error))

    # --- the thread that tokenizes: a long text holds up no ``Cancel`` ---

    def _tokenize_arrived(self) -> None:
        while True:
            command = self._arrived.get()
            match command:
                case Shutdown():
                    return
                case Cancel():
                    self._tell_engine(command)
                    self._compiling.put(command)
                case _ if self._engine is None:
                    message = "the model is not loaded yet"
                    self._emitter.put(Refused(Failed(id=command.id, code="invalid_request", message=message)))
                case _:
                    self._take_in(self._engine, command)

    def _take_in(self, engine: LoadedEngine[SequenceT], request: Generate | Embed | Rank | Tokenize) -> None:
        if unseen := picture_refusal(request, engine.capabilities):
            self._emitter.put(Refused(unseen))
            return
        match request:
            case Generate():
                self._generate(engine, request)
            case Embed() | Rank():
                self._read_text(engine, request)
            case Tokenize():
                tokens = engine.tokenizer.encode(request.prompt, add_bos=request.add_bos)
                for part in tokenized(request, tokens, engine.tokenizer.n_vocab, engine.tokenizer):
                    self._emitter.put(Refused(part) if isinstance(part, Failed) else part)

    def _generate(self, engine: LoadedEngine[SequenceT], request: Generate) -> None:
        if engine.no_generation:
            self._emitter.put(Refused(refused(request.id, "model", engine.no_generation)))
            return
        if request.reasoning is not None:
            self._encode_closing(engine.tokenizer, request.reasoning.closing)
        try:
            prepared = engine.prepare(request)
        except PictureError as error:
            self._emitter.put(Refused(refused(request.id, "prompt", str(error))))
            return
        if wrong := refusal(request, prepared.prompt, engine.capabilities):
            self._emitter.put(Refused(wrong))
        elif not engine.capabilities.grammar and (request.grammar is not None or request.reasoning is not None):
            param = "reasoning" if request.grammar is None else "grammar"
            self._emitter.put(Refused(refused(request.id, param, "no token can be prescribed to this model here")))
        elif request.grammar is None:
            self._begin(engine, request, prepared)
        else:
            self._compiling.put((request, prepared))

    def _encode_closing(self, tokenizer: Tokenizer, text: str) -> None:
        """Encodes a text that closes reasoning. A model has one or two of them."""
        if text not in self._closings:
            self._closings[text] = tokenizer.encode((Text(text=text, special=True),), add_bos=False)

    def _read_text(self, engine: LoadedEngine[SequenceT], request: Embed | Rank) -> None:
        tokens = engine.text_tokens(request)
        if isinstance(request, Embed):
            tokens = within(request, tokens, engine.longest_text, engine.closing)
        if wrong := input_refusal(request, tokens, engine.capabilities, engine.longest_text):
            self._emitter.put(Refused(wrong))
            return
        self._emitter.put(TextAccepted(request.id, len(tokens)))
        engine.commands.put(TextJob(request.id, tokens, "vector" if isinstance(request, Embed) else "score"))

    # --- the thread that compiles grammars: a slow grammar holds up no other request ---

    def _begin_compiled(self) -> None:
        while True:
            match self._compiling.get():
                case (request, prepared):
                    assert self._engine is not None
                    self._begin(self._engine, request, prepared)
                case Cancel() as command:
                    self._tell_engine(command)
                case Shutdown():
                    return

    def _begin(self, engine: LoadedEngine[SequenceT], request: Generate, prepared: Prepared[SequenceT]) -> None:
        """Accepts a request and hands it to the engine, unless its grammar is faulty or nothing is left to generate."""
        n_prompt = len(prepared.prompt)
        n_limit = length_limit(request, n_prompt, engine.capabilities.context_length)
        resumed = resume(request, n_prompt, n_limit, engine.tokenizer)
        constraint: Constraint | None = None
        if resumed.ended is None:
            try:
                constraint = self._constraint(engine.tokenizer, request)
            except GrammarError as error:
                self._emitter.put(Refused(grammar_failure(request.id, error)))
                return
            if constraint is not None and constraint.finished:
                resumed = replace(resumed, ended="stop")
        self._emitter.put(Accepted(request.id, n_prompt, len(request.delivered), resumed, request.show_special))
        if resumed.ended is None:
            engine.commands.put(prepared.new_sequence(n_limit, constraint))

    def _constraint(self, tokenizer: Tokenizer, request: Generate) -> Constraint | None:
        """Returns what restricts a request's next tokens, after those delivered. Raises GrammarError."""
        if request.grammar is None and request.reasoning is None:
            return None
        grammar, budget = None, None
        if request.grammar is not None:
            grammar = self._grammars(tokenizer).compile(request.grammar, request.delivered)
        if (limit := request.reasoning) is not None:
            budget = ReasoningBudget(limit, self._closings[limit.closing], tokenizer.piece_of, request.delivered)
        return Constraint(tokenizer.n_vocab, grammar, budget)

    def _grammars(self, tokenizer: Tokenizer) -> GrammarCompiler:
        """Returns the compiler of grammars, made for the first one; only the grammar thread has a use for it."""
        if self._compiler is None:
            known = tokenizer.piece_of, tokenizer.is_control, tokenizer.eog_tokens, tokenizer.n_vocab
            self._compiler = GrammarCompiler(*known)
        return self._compiler

    # --- the engine's thread ---

    def _run_engine(self, command: Load) -> None:
        """Loads the model and computes. An error of the engine ends the process: its results cannot be trusted."""
        try:
            engine = self._loaded(command)
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- a library may raise anything
            self._fail(self._cannot_load(error))
            return
        collect_as_usual()
        try:
            self._emitter.vocabulary = engine.tokenizer
            self._emitter.stop_engine = lambda request: engine.commands.put(Cancel(id=request))
            self._emitter.counts = engine.counts
            self._emitter.cpu_use = engine.cpu_use
            self._emitter.prefix_use = engine.prefix_use
            self._engine = engine
            self._emitter.put(Status(state="Ready", capabilities=engine.capabilities))
            engine.run()
        except Exception as error:
            if (failed := self._explain(error)) is None:
                raise
            self._fail(failed)

    def _loaded(self, command: Load) -> LoadedEngine[SequenceT]:
        """Loads the model, once more with ``command.smaller`` if memory runs out. Raises what ``load`` raises."""
        try:
            return self._load(command)
        except LoadError as error:
            if error.code != "out_of_memory" or not command.smaller:
                raise
            why = str(error)
        # The exception had held the first attempt's objects.
        gc.collect()
        sys.stderr.write(f"out of memory, so the model is loaded with {dict(command.smaller)}: {why}\n")
        table = {**command.table, **command.smaller}
        engine = self._load(command.model_copy(update={"table": table, "smaller": {}}))
        return replace(engine, capabilities=engine.capabilities.model_copy(update={"retried": why}))

    # --- the end ---

    def _cannot_load(self, error: BaseException) -> Failed:
        """Returns the failure of a load or estimate. The library would raise the error in another process as well."""
        if not isinstance(error, LoadError):
            if isinstance(error, Exception) and (known := self._explain(error)) is not None:
                return known
            traceback.print_exception(error)
            error = from_library("the model cannot be loaded", error, out_of_memory=False)
        return Failed(code=error.code, message=str(error))

    def _fail(self, failure: Failed) -> None:
        self._emitter.put(failure)
        self._emitter.close()
        exit_now(1)

    def _shut_down(self, command: Shutdown) -> None:
        self._emitter.put(Status(state="ShuttingDown"))
        self._arrived.put(command)
        self._tokenizer_thread.join()
        self._compiling.put(command)
        self._grammar_thread.join()
        if self._engine is not None and self._engine_thread is not None:
            self._tell_engine(command)
            self._engine_thread.join()
        self._emitter.put(Status(state="Shutdown"))
        self._emitter.close()


def _started(name: str, target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
