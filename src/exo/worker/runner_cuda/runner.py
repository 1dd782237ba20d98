"""Takes commands in the reading thread and runs the engine in its own; the emitter's thread makes text and writes.

The three share queues and nothing else.
"""

import threading

from exo.worker.admission import length_limit, refusal, resume
from exo.worker.emitter import Accepted, Emitter
from exo.worker.messages import Cancel, Command, Failed, Generate, Load, Shutdown, Status
from exo.worker.runner_cuda.engine import Engine, Leave, Stop
from exo.worker.runner_cuda.llama import EngineError
from exo.worker.runner_cuda.loading import Loaded, load
from exo.worker.runner_cuda.options import LoadError
from exo.worker.runner_cuda.sampler import Sampler
from exo.worker.runner_cuda.scheduler import Scheduler
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.wire import exit_now


class Runner:
    """One runner, from the first command to the last."""

    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter
        self._thread: threading.Thread | None = None
        self._ready: tuple[Engine, Loaded] | None = None

    def take(self, command: Command | Failed) -> None:
        """Acts on one command, or passes on why a line was none. ``Shutdown`` does not return."""
        match command:
            case Load():
                self._start(command)
            case Generate():
                self._generate(command)
            case Cancel():
                if self._ready is not None:
                    self._ready[0].commands.put(Leave(command.id, told=False))
            case Shutdown():
                self._shut_down()
            case Failed():
                self._emitter.put(command)

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
        engine, loaded = self._ready
        prompt = loaded.tokenizer.encode(request.prompt)
        n_ctx = loaded.context.n_ctx
        if refused := refusal(request, prompt, loaded.tokenizer.n_vocab, n_ctx):
            self._emitter.put(refused)
            return
        sampler = Sampler(request.sampling, loaded.tokenizer.eog_tokens if request.ignore_eos else ())
        sampler.accept_prompt(prompt)
        for token in request.delivered:
            sampler.accept(token)
        n_limit = length_limit(request, len(prompt), n_ctx)
        resumed = resume(request, len(prompt), n_limit, loaded.tokenizer)
        self._emitter.put(Accepted(request.id, len(prompt), len(request.delivered), resumed))
        if resumed.ended is None:
            tokens = [*prompt, *request.delivered]
            engine.commands.put(Sequence(request.id, tokens, len(tokens), n_limit, sampler))

    def _run_engine(self, command: Load) -> None:
        """The engine's thread. An engine that fails takes the process with it: nothing it computes can be trusted."""
        try:
            loaded = load(command, self._emitter.put)
            scheduler = Scheduler(loaded.capabilities.slots, loaded.budget, loaded.chunk, loaded.context.trim)
            engine = Engine(loaded.context, scheduler, loaded.tokenizer, self._emitter)
            self._emitter.bytes_of = loaded.tokenizer.bytes_of
            self._emitter.stop_engine = lambda request: engine.commands.put(Leave(request, told=True))
            self._emitter.load = engine.load
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
        if self._ready is not None and self._thread is not None:
            self._ready[0].commands.put(Stop())
            self._thread.join()
        self._emitter.put(Status(state="Shutdown"))
        self._emitter.close()
        exit_now(0)
