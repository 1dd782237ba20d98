"""One runner: a process with one loaded model, and everything that the server knows about it."""

import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

import anyio

from exo.worker.child import Child, ProtocolError, StderrLog, spawn
from exo.worker.diagnosis import diagnose
from exo.worker.messages import (
    Cancel,
    Capabilities,
    Deltas,
    Event,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    Load,
    PrefillProgress,
    RunnerState,
    Shutdown,
    Status,
)
from exo.worker.request_events import RequestEvents

ENDINGS: tuple[RunnerState, ...] = ("ShuttingDown", "Shutdown", "Failed")
_TRANSITIONS: dict[RunnerState, tuple[RunnerState, ...]] = {
    "Idle": ("Loading", *ENDINGS),
    "Loading": ("Loading", "Loaded", *ENDINGS),
    "Loaded": ("WarmingUp", "Ready", *ENDINGS),
    "WarmingUp": ("Ready", *ENDINGS),
    "Ready": ("Running", *ENDINGS),
    "Running": ("Ready", *ENDINGS),
    "ShuttingDown": ("Shutdown", "Failed"),
    "Shutdown": (),
    "Failed": ("Failed",),  # said twice, as a Status and as a Failed without id, in either order
}
"""Every runner starts Idle, and its first line says so. What is not listed here is a protocol error."""

_LOADING: tuple[RunnerState, ...] = ("Idle", "Loading", "Loaded", "WarmingUp")
_SERVING: tuple[RunnerState, ...] = ("Ready", "Running")
_FINAL: tuple[RunnerState, ...] = ("Shutdown", "Failed")

_LAST_WORDS_SECONDS = 2.0
"""How long a runner whose state is final may go on talking before its process is ended."""


_LOOKS = 5
"""How often a silence is looked at before its deadline. A server that is itself stopped for a while, as by Ctrl-Z, then
misses one look and not the whole deadline."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds after which a runner is taken for dead."""

    handshake: float = 60
    """Until its first word."""
    loading: float = 60
    """Without a word while it loads: libraries that start up may hold the interpreter, and the heartbeat, for long."""
    serving: float = 10
    """Without a word once the model is loaded."""
    step: float = 300
    """Without a step while requests are active."""
    grace: float = 5
    """For each of the ways to end it, from the polite to the last."""


DEADLINES = Deadlines()


class RunnerError(Exception):
    """The runner cannot serve: it did not start, could not load, died or was shut down. ``failed`` says why.

    ``retry_seconds`` tells when to try again, where that is known to make sense.
    """

    def __init__(self, failed: Failed, retry_seconds: float | None = None) -> None:
        super().__init__(failed.message)
        self.failed = failed
        self.retry_seconds = retry_seconds


@final
class RunnerProcess:
    """Starts ``command`` and has it execute ``load``; standard error goes to the file ``log``.

    ``run`` is the process's whole life, from spawning to reaping, and must be started once, in a task group that
    outlives every request. Everything else may be called from any task of the same event loop.
    """

    def __init__(self, command: Sequence[str], load: Load, log: Path, deadlines: Deadlines = DEADLINES) -> None:
        self._command = tuple(command)
        self._load = load
        self._log = log
        self._deadlines = deadlines
        self._heard = False
        self._steps = (-1, 0.0)
        self._life = anyio.CancelScope()
        self._child: Child | None = None
        self._requests: dict[str, RequestEvents] = {}
        self._status = Status(state="Idle")
        self._changed = anyio.Event()
        self._capabilities: Capabilities | None = None
        self._last_word: Failed | None = None
        self._closing = False
        self._failure: Failed | None = None
        self._ended = anyio.Event()
        self.proven = anyio.Event()
        """Set with the first token that the runner computes: it loads, and it works."""

    @property
    def status(self) -> Status:
        """What the runner said last of its state; "Failed" or "Shutdown" once it is gone."""
        return self._status

    @property
    def capabilities(self) -> Capabilities | None:
        """What the runner can do, from its first "Ready" on."""
        return self._capabilities

    @property
    def failure(self) -> Failed | None:
        """Why the process is gone, or None while it exists."""
        return self._failure

    def died_of(self, failed: Failed) -> bool:
        """Whether this failure of a request is the process's own, and says nothing about the request."""
        return self._failure is not None and failed == _for_request(self._failure, failed.id)

    @property
    def pending(self) -> int:
        """Requests whose terminal event the runner still owes."""
        return len(self._requests)

    def loading(self) -> AsyncIterator[Status]:
        """The status now and after each change, until the runner is ready or gone.

        Any number of tasks may watch. A slow one misses statuses in between, never the last. Cancelling a wait, for
        instance by a timeout, loses nothing: the iteration can go on.
        """
        return _Loading(self)

    async def status_after(self, seen: Status | None) -> Status:
        """Waits until the status is another one than ``seen``."""
        while self._status is seen:
            await self._changed.wait()
        return self._status

    async def ready(self) -> Capabilities:
        """Waits until the model is loaded. Raises ``RunnerError``."""
        async for _ in self.loading():
            pass
        if self._capabilities is not None and self._status.state in _SERVING:
            return self._capabilities
        raise RunnerError(await self.ended())

    async def ended(self) -> Failed:
        """Waits until the process is gone and reaped, and says why."""
        await self._ended.wait()
        assert self._failure is not None
        return self._failure

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncGenerator[RequestEvents]:
        """Sends the request and gives its events. Leaving before the terminal event cancels it, and never waits.

        A runner that dies, or is gone already, ends the events with ``Failed``. Raises ``ValueError`` for an id in
        use and ``RuntimeError`` before the runner was ready.
        """
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        events = RequestEvents()
        if self._failure is not None:
            events.put(_for_request(self._failure, request.id))
        elif self._child is None or self._capabilities is None:
            raise RuntimeError("generate() before ready()")
        else:
            self._requests[request.id] = events  # before the command, so that no answer comes too early
            self._child.send(request)
        try:
            yield events
        finally:
            events.discard()
            if self._requests.get(request.id) is events and self._child is not None:
                self._child.send(Cancel(id=request.id))

    async def close(self) -> None:
        """Ends the runner: ``Shutdown`` and end of input, then SIGTERM, then SIGKILL. Returns once it is reaped."""
        self._closing = True
        if self._child is not None:
            self._child.send(Shutdown())
            self._child.end_input()
            with anyio.move_on_after(self._deadlines.grace):
                await self._ended.wait()
            if not self._ended.is_set():
                self._child.signal(signal.SIGTERM)
            with anyio.move_on_after(self._deadlines.grace):
                await self._ended.wait()
        self._life.cancel()
        await self._ended.wait()

    def kill(self) -> None:
        """Ends the runner at once, with SIGKILL."""
        self._closing = True
        self._life.cancel()

    async def run(
        self, after: Sequence["RunnerProcess"] = (), on_end: Callable[[Failed], None] = lambda _: None
    ) -> None:
        """The process's life. Returns when it is over, whatever ended it; cancelling it kills the process.

        It begins when the processes ``after`` have ended, and the memory of their models is free. ``on_end`` is told
        why it is over before any request is.
        """
        failure = Failed(code="shutdown", message="the runner was shut down")
        try:
            with self._life:
                for predecessor in after:
                    await predecessor.ended()
                failure = await self._live()
        finally:
            on_end(failure)
            self._end(failure)

    async def _live(self) -> Failed:
        """Spawns, serves and reaps. Returns why the process ended."""
        try:
            log = StderrLog(self._log)
        except OSError as error:
            return Failed(code="runner_died", message=f"the runner's log cannot be opened: {error}")
        try:
            async with spawn(self._command, log) as child:
                self._child = child
                broke = await self._serve(child)
                how = f"was ended: {broke}" if broke else await child.exit()
        except OSError as error:
            return Failed(code="runner_died", message=f"{self._command[0]} could not be started: {error}")
        finally:
            log.close()
        return self._diagnosis(how, log.last_lines())

    async def _serve(self, child: Child) -> str | None:
        """Handles events until the runner's output ends. Returns what was wrong with them, if anything."""
        silence: list[str] = []
        broke: str | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._end_if_silent, child, silence)
            broke = await self._read(child)
            tasks.cancel_scope.cancel()
        return next(iter(silence), broke)

    async def _read(self, child: Child) -> str | None:
        try:
            async with aclosing(child.events()) as events:
                await self._greet(child, events)
                while self._status.state not in _FINAL and (event := await anext(events, None)):
                    self._on_event(event)
                with anyio.move_on_after(_LAST_WORDS_SECONDS) as last_words:
                    async for event in events:
                        self._on_event(event)
                if last_words.cancelled_caught:
                    return f"it said {self._status.state} and did not exit"
        except ProtocolError as error:
            return str(error)
        return None

    async def _end_if_silent(self, child: Child, verdict: list[str]) -> None:
        """Kills a runner that says nothing for too long, not even its heartbeat: it is stopped, or it hangs."""
        look = min(self._deadlines.loading, self._deadlines.serving) / _LOOKS
        silence, allowed = 0.0, self._deadlines.loading
        while silence < allowed:
            self._heard = False
            await anyio.sleep(look)
            silence = 0.0 if self._heard else silence + look
            allowed = self._deadlines.loading if self._status.state in _LOADING else self._deadlines.serving
        verdict.append(f"it said nothing for {allowed:g} seconds, not even its heartbeat")
        child.signal(signal.SIGKILL)

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        """Raises ``ProtocolError`` for a loop that has something to compute and stands still."""
        steps, since = self._steps
        now = anyio.current_time()
        if beat.steps != steps or not beat.active:
            self._steps = beat.steps, now
        elif now - since > self._deadlines.step:
            raise ProtocolError(f"it has computed nothing for {self._deadlines.step:g} seconds, with requests active")

    async def _greet(self, child: Child, events: AsyncGenerator[Event]) -> None:
        """The handshake: a runner says Idle, and is told what to load. Raises ``ProtocolError``."""
        first: Event | None = None
        with anyio.move_on_after(self._deadlines.handshake) as handshake:
            first = await anext(events, None)
        if handshake.cancelled_caught:
            raise ProtocolError(f"it said nothing within {self._deadlines.handshake:g} seconds of its start")
        match first:
            case Status(state="Idle"):
                child.send(self._load)
            case Failed(id=None):
                self._on_event(first)
            case None:
                pass
            case _:
                raise ProtocolError(f"its first message was {first.type!r} instead of the status Idle")

    def _on_event(self, event: Event) -> None:
        self._heard = True
        match event:
            case Deltas(items=items):
                self.proven.set()
                for delta in items:
                    self._owed(delta.id).put(delta)
            case PrefillProgress(id=request):
                self._owed(request).put(event)
            case Finished(id=request) | Failed(id=str(request)):
                self._owed(request).put(event)
                del self._requests[request]
            case Failed():
                self._last_word = event
                self._enter(Status(state="Failed"))
            case Status():
                self._enter(event)
            case Heartbeat():
                self._on_heartbeat(event)

    def _owed(self, request: str) -> RequestEvents:
        try:
            return self._requests[request]
        except KeyError:
            raise ProtocolError(f"it spoke of request {request!r}, which it does not have") from None

    def _enter(self, status: Status) -> None:
        """The only writer of the state."""
        if status.state not in _TRANSITIONS[self._status.state]:
            raise ProtocolError(f"it went from {self._status.state} to {status.state}")
        due = status.state == "Ready" and self._capabilities is None
        if due != (status.capabilities is not None):
            raise ProtocolError("capabilities must come with the first Ready, and only then")
        self._status = status
        self._capabilities = status.capabilities or self._capabilities
        self._changed.set()
        self._changed = anyio.Event()

    def _diagnosis(self, how: str, stderr: str) -> Failed:
        if self._closing:
            return Failed(code="shutdown", message="the runner was shut down")
        if self._last_word is not None:
            return self._last_word
        return diagnose(how, stderr)

    def _end(self, failure: Failed) -> None:
        self._failure = failure
        if self._status.state not in _FINAL:
            self._enter(Status(state="Shutdown" if failure.code == "shutdown" else "Failed"))
        for request, events in self._requests.items():
            events.put(_for_request(failure, request))
        self._requests.clear()
        self._ended.set()


@final
class _Loading(AsyncIterator[Status]):
    """See ``RunnerProcess.loading``."""

    def __init__(self, process: RunnerProcess) -> None:
        self._process = process
        self._seen: Status | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Status:
        status = await self._process.status_after(self._seen)
        if status.state not in _LOADING:
            raise StopAsyncIteration
        self._seen = status
        return status


def _for_request(failure: Failed, request: str | None) -> Failed:
    return failure.model_copy(update={"id": request})
