"""Takes commands in the reading thread and runs the engine in its own; the emitter's thread makes text and writes.

The three share queues and nothing else.
"""

import threading

from exo.worker.admission import length_limit, refusal, resume
from exo.worker.emitter import Accepted, Emitter
from exo.worker.messages import Cancel, Command, Failed, Generate, Load, Shutdown, Status
from exo.worker.runner_mlx.engine import Engine, Leave, Stop
from exo.worker.runner_mlx.loading import Loaded, load
from exo.worker.runner_mlx.model import ran_out_of_memory
from exo.worker.runner_mlx.options import LoadError
from exo.worker.runner_mlx.scheduler import Scheduler
from exo.worker.runner_mlx.sequence import Sequence
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
        n_ctx = loaded.capabilities.context_length
        if refused := refusal(request, prompt, loaded.tokenizer.n_vocab, n_ctx):
            self._emitter.put(refused)
            return
        n_limit = length_limit(request, len(prompt), n_ctx)
        resumed = resume(request, len(prompt), n_limit, loaded.tokenizer)
        self._emitter.put(Accepted(request.id, len(prompt), len(request.delivered), resumed))
        if resumed.ended is None:
            engine.commands.put(
                Sequence(
                    id=request.id,
                    tokens=[*prompt, *request.delivered],
                    n_prompt=len(prompt),
                    n_limit=n_limit,
                    sampling=request.sampling,
                    forbidden=loaded.tokenizer.eog_tokens if request.ignore_eos else (),
                )
            )

    def _run_engine(self, command: Load) -> None:
        """The engine's thread: MLX's streams belong to the thread that made them, so all of MLX happens here.

        An engine that fails takes the process with it: nothing it computes can be trusted.
        """
        try:
            loaded = load(command, self._emitter.put)
            scheduler = Scheduler(loaded.capabilities.slots, loaded.chunk)
            engine = Engine(loaded.model, loaded.cache, scheduler, loaded.tokenizer, self._emitter)
            self._emitter.bytes_of = loaded.tokenizer.bytes_of
            self._emitter.stop_engine = lambda request: engine.commands.put(Leave(request, told=True))
            self._emitter.load = engine.load
            self._ready = engine, loaded
            self._emitter.put(Status(state="Ready", capabilities=loaded.capabilities))
            engine.run()
        except LoadError as error:
            self._fail(Failed(code=error.code, message=str(error)))
        except (RuntimeError, MemoryError) as error:
            code = "out_of_memory" if ran_out_of_memory(error) else "engine_error"
            self._fail(Failed(code=code, message=f"MLX failed: {error}"))

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
