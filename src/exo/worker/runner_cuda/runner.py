"""Takes commands in the reading thread, tokenizes in a second, compiles grammars in a third and computes in a fourth.

They and the emitter's thread, which makes text and writes, share queues and nothing else. A ``Cancel`` waits for none
of them.
"""

import threading
from dataclasses import replace
from queue import Queue, SimpleQueue

from exo.worker.protocol.messages import (
    Cancel,
    Command,
    Cores,
    Embed,
    Estimate,
    Failed,
    Generate,
    Load,
    Rank,
    Shutdown,
    Status,
    Tokenize,
)
from exo.worker.protocol.wire import exit_now
from exo.worker.runner_common.grammar.guided_decoding import Constraint, Constraints, GrammarError, grammar_failure
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.output_processor import Accepted, Asked, Emitter
from exo.worker.runner_common.request_checks import (
    ARRIVED,
    input_refusal,
    length_limit,
    refusal,
    resume,
    tokenized,
    within,
)
from exo.worker.runner_cuda.bindings import EngineError
from exo.worker.runner_cuda.embedding import Job
from exo.worker.runner_cuda.engine import Engine, Leave, Stop
from exo.worker.runner_cuda.loading.estimate import estimate
from exo.worker.runner_cuda.loading.loader import Loaded, load
from exo.worker.runner_cuda.sampling.sampler import Sampler
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.tokenizer import Tokenizer


class Runner:
    """One runner, from the first command to the last."""

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._thread: threading.Thread | None = None
        self._ready: tuple[Engine, Loaded] | None = None
        self._constraints: Constraints | None = None
        self._compiling: SimpleQueue[tuple[Generate, list[int]] | Leave | Stop] = SimpleQueue()
        self._compiler = threading.Thread(target=self._compile, name="grammar", daemon=True)
        self._compiler.start()
        self._arrived: Queue[Generate | Embed | Rank | Tokenize | Leave | Stop] = Queue(ARRIVED)
        self._tokenizing = threading.Thread(target=self._tokenize, name="tokenizer", daemon=True)
        self._tokenizing.start()

    def take(self, command: Command | Failed) -> None:
        """Acts on one command, or passes on why a line was none. ``Shutdown`` does not return."""
        match command:
            case Estimate():
                threading.Thread(target=self._estimate, args=(command,), name="estimate", daemon=True).start()
            case Load():
                self._start(command)
            case Generate() | Embed() | Rank() | Tokenize():
                self._arrived.put(command)
            case Cancel():
                self._cancel(command)
            case Cores():
                if self._ready is not None:
                    self._ready[0].commands.put(command)
            case Shutdown():
                self._shut_down()
            case Failed():
                self._emitter.put(command)

    def _tokenize(self) -> None:
        """The thread where requests begin, so that a long text holds up no ``Cancel``."""
        while True:
            match self._arrived.get():
                case Generate() as request:
                    self._generate(request)
                case Embed() | Rank() | Tokenize() as request:
                    self._ask(request)
                case Leave() as leave:
                    self._leave(leave)
                    self._compiling.put(leave)
                case _:
                    return

    def _estimate(self, command: Estimate) -> None:
        try:
            self._emitter.put(estimate(command))
        except LoadError as error:
            self._fail(Failed(code=error.code, message=str(error)))

    def _start(self, command: Load) -> None:
        if self._thread is not None:
            self._emitter.put(Failed(code="invalid_request", message="a model is loaded already"))
            return
        self._thread = threading.Thread(target=self._run_engine, args=(command,), name="engine", daemon=True)
        self._thread.start()

    def _generate(self, request: Generate) -> None:
        if self._ready is None:
            message = "the model is not loaded yet"
            self._emitter.put(Failed(id=request.id, code="invalid_request", message=message))
            return
        _, loaded = self._ready
        if not loaded.context.generates:
            message = "model: it is an encoder, which makes vectors of texts and generates none"
            self._emitter.put(Failed(id=request.id, code="invalid_request", message=message, param="model"))
            return
        prompt = loaded.tokenizer.encode(request.prompt)
        n_ctx = loaded.context.n_ctx
        if refused := refusal(request, prompt, loaded.tokenizer.n_vocab, n_ctx):
            self._emitter.put(refused)
            return
        if request.grammar is None:
            self._begin(request, prompt)
        else:
            self._compiling.put((request, prompt))

    def _compile(self) -> None:
        """The thread where requests with a grammar begin, so that one that is slow to compile holds up no others."""
        while True:
            match self._compiling.get():
                case (Generate() as request, prompt):
                    self._begin(request, prompt)
                case Leave() as leave:
                    self._leave(leave)
                case _:
                    return

    def _begin(self, request: Generate, prompt: list[int]) -> None:
        """Accepts a request that can be served, unless its grammar cannot, and hands it to the engine."""
        assert self._ready is not None
        engine, loaded = self._ready
        n_limit = length_limit(request, len(prompt), loaded.context.n_ctx)
        resumed = resume(request, len(prompt), n_limit, loaded.tokenizer)
        try:
            constraint = self._constraint(request, loaded.tokenizer) if resumed.ended is None else None
        except GrammarError as error:
            self._emitter.put(grammar_failure(request.id, error))
            return
        if constraint is not None and constraint.finished:
            resumed = replace(resumed, ended="stop")
        self._emitter.put(Accepted(request.id, len(prompt), len(request.delivered), resumed, request.show_special))
        if resumed.ended is not None:
            return
        sampler = Sampler(request.sampling, loaded.tokenizer.eog_tokens if request.ignore_eos else ())
        sampler.accept_prompt(prompt)
        for token in request.delivered:
            sampler.accept(token)
        engine.commands.put(
            Sequence(
                id=request.id,
                tokens=[*prompt, *request.delivered],
                n_prompt=len(prompt),
                n_prefill=len(prompt) + len(request.delivered),
                n_limit=n_limit,
                sampler=sampler,
                constraint=constraint,
                logprobs=request.logprobs,
                prompt_logprobs=request.prompt_logprobs,
                exact=request.exact or bool(request.delivered),
            )
        )

    def _constraint(self, request: Generate, tokenizer: Tokenizer) -> Constraint | None:
        """What the request's grammar allows after the tokens delivered. Raises GrammarError."""
        if request.grammar is None:
            return None
        if self._constraints is None:
            known = tokenizer.piece_of, tokenizer.is_control, tokenizer.eog_tokens, tokenizer.n_vocab
            self._constraints = Constraints(*known)
        return self._constraints.compile(request.grammar, request.delivered)

    def _cancel(self, command: Cancel) -> None:
        leave = Leave(command.id, told=False)
        self._leave(leave)
        self._arrived.put(leave)  # it may be in that line itself, or in the compiler's

    def _leave(self, leave: Leave) -> None:
        if self._ready is not None:
            self._ready[0].commands.put(leave)

    def _ask(self, request: Embed | Rank | Tokenize) -> None:
        if self._ready is None:
            message = "the model is not loaded yet"
            self._emitter.put(Failed(id=request.id, code="invalid_request", message=message))
            return
        engine, loaded = self._ready
        if isinstance(request, Tokenize):
            tokens = loaded.tokenizer.encode(request.prompt, add_bos=request.add_bos)
            for part in tokenized(request, tokens, loaded.tokenizer.n_vocab, loaded.tokenizer):
                self._emitter.put(part)
            return
        longest = loaded.embedder.longest
        match request:
            case Embed():
                whole = loaded.framing.text(request.prompt)
                job = Job(request.id, within(request, whole, longest, loaded.framing.closing), "vector")
            case Rank():
                job = Job(request.id, loaded.framing.pair(request.query, request.document), "score")
        if refused := input_refusal(request, job.tokens, loaded.capabilities, longest):
            self._emitter.put(refused)
            return
        self._emitter.put(Asked(job.id, len(job.tokens)))
        engine.commands.put(job)

    def _run_engine(self, command: Load) -> None:
        """The engine's thread. An engine that fails takes the process with it: nothing it computes can be trusted."""
        try:
            loaded = load(command, self._emitter.put)
            parts = loaded.context, loaded.embedder, loaded.scheduler, loaded.tokenizer, loaded.sampling
            engine = Engine(*parts, loaded.threads, self._emitter)
            self._emitter.vocabulary = loaded.tokenizer
            self._emitter.stop_engine = lambda request: engine.commands.put(Leave(request, told=True))
            self._emitter.load = engine.load
            self._emitter.cpu = loaded.threads.use
            self._ready = engine, loaded
            self._emitter.put(Status(state="Ready", capabilities=loaded.capabilities))
            engine.run()
            loaded.free()
        except LoadError as error:
            self._fail(Failed(code=error.code, message=str(error)))
        except EngineError as error:
            self._fail(Failed(code="engine_error", message=str(error)))

    def _fail(self, failure: Failed) -> None:
        self._emitter.put(failure)
        self._emitter.close()
        exit_now(1)

    def _shut_down(self) -> None:
        self._emitter.put(Status(state="ShuttingDown"))
        self._arrived.put(Stop())
        self._tokenizing.join()
        self._compiling.put(Stop())
        self._compiler.join()
        if self._ready is not None and self._thread is not None:
            self._ready[0].commands.put(Stop())
            self._thread.join()
        self._emitter.put(Status(state="Shutdown"))
        self._emitter.close()
        exit_now(0)
