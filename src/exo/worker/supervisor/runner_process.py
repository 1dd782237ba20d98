"""One runner: a process with one loaded model, and the server's knowledge of it."""

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import final, overload

import anyio

from exo.worker.protocol.commands import Cancel, Cores, Embed, Generate, Load, Rank, Request, Shutdown, Tokenize
from exo.worker.protocol.cores import CPU_BACKENDS
from exo.worker.protocol.events import (
    Capabilities,
    CpuUse,
    Deltas,
    Embedded,
    Event,
    Failed,
    Finished,
    PrefixUse,
    Ranked,
    Status,
    Tokenized,
)
from exo.worker.protocol.wire import ProtocolError
from exo.worker.supervisor.child_process import ChildProcess, Outbox, spawn
from exo.worker.supervisor.crash_report import StderrLog, diagnose
from exo.worker.supervisor.model_load import Admit, ModelLoad
from exo.worker.supervisor.request_timer import RequestCount, RequestTimer, TokenRate
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.state_machine import (
    FINAL,
    LOADING,
    REPLY_TYPES,
    SERVING,
    PendingReply,
    Recipient,
    RequestEvents,
    RunnerStateMachine,
    UnaryReply,
    UnaryRequest,
    for_request,
)
from exo.worker.supervisor.watchdog import DEADLINES, Deadlines, HeartbeatWatchdog

log = logging.getLogger(__name__)

_EXIT_SECONDS = 2.0
"""Time between a runner's final state and its exit, before it is killed."""
_SHUT_DOWN = Failed(code="shutdown", message="the runner was shut down")


@final
class RunnerProcess:
    """Starts ``command`` and has it execute ``load``; standard error goes to the file ``log``.

    With ``admit``, the runner first estimates the memory of its load, and loads once that is granted. ``on_activity``
    is called when the runner gets its first request and when it has none left.

    ``run`` is the process's whole life, from spawning to reaping. It must be started once, in a task group that
    outlives every request. Everything else may be called from any task of the same event loop.
    """

    def __init__(
        self,
        command: Sequence[str],
        load: Load,
        log: Path,
        deadlines: Deadlines = DEADLINES,
        admit: Admit | None = None,
        timer: RequestTimer | None = None,
        on_activity: Callable[[], None] = lambda: None,
    ) -> None:
        self._command = tuple(command)
        self._load = ModelLoad(load, admit, deadlines)
        self._log = log
        self._deadlines = deadlines
        self._timer = timer or RequestTimer(RequestCount(), lambda _: None)
        self._on_activity = on_activity
        self._machine = RunnerStateMachine(deadlines.step)
        self._watchdog = HeartbeatWatchdog(deadlines)
        self._greeted, self._final = asyncio.Event(), asyncio.Event()  # its first message; its final state
        self._life = anyio.CancelScope()
        self._child: ChildProcess | None = None
        self._outbox: Outbox | None = None
        self._ended = anyio.Event()
        self._busy = False
        self._cores: int | None = None  # the share of the CPU that it was sent last
        # Why it ended. Several of these may hold; ``_cause`` orders them.
        self._closing = False
        self.displaced: Failed | None = None  # it worked, and another process must take over its requests
        self._violation: str | None = None  # of the protocol or a deadline, as a predicate of the runner
        self._culprit: str | None = None  # the request whose answer broke the protocol
        self.failure: Failed | None = None  # None while the process exists
        self.told_notes = False  # whether a reply has had its notes
        self.warnings: tuple[str, ...] = ()  # the server's own notes for the user
        self.produced_output = self._machine.produced_output
        self.rate = TokenRate()

    @property
    def status(self) -> Status:
        """The runner's last status; "Failed" or "Shutdown" once it is gone."""
        return self._machine.status

    @property
    def capabilities(self) -> Capabilities | None:
        """None until the model is loaded."""
        return self._machine.capabilities

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about this process: how it was loaded, and its model's faults."""
        return (*self.warnings, *(self._load.notes(self.capabilities) if self.capabilities is not None else ()))

    @property
    def refused(self) -> Failed | None:
        """Why there was no memory for its model, which is no fault of the runner."""
        return self._load.refused

    @property
    def pid(self) -> int | None:
        """The process id, while there is a process."""
        return None if self._child is None or self.failure is not None else self._child.pid

    @property
    def began(self) -> bool:
        """Whether it has been spawned. It may have to wait for predecessors first."""
        return self._child is not None

    def died_of(self, failed: Failed) -> bool:
        """Whether this failure of a request is the process's own, and not the request's."""
        return self.failure is not None and failed == for_request(self.failure, failed.id)

    def blames(self, request: str | None) -> bool:
        """Whether the answer to this request broke the protocol. A replay could kill the next runner as well."""
        return self._culprit is not None and request == self._culprit

    @property
    def pending(self) -> int:
        """The number of requests without a terminal event."""
        return len(self._machine.requests)

    @property
    def cpu(self) -> CpuUse | None:
        """Its use of the CPU, if it reports that."""
        return self._machine.cpu

    @property
    def prefixes(self) -> PrefixUse | None:
        """The hits of prompts in its prefix cache, if it reports them."""
        return self._machine.prefixes

    @property
    def computes_on_cpu(self) -> bool:
        """Whether it needs cores while it has requests."""
        model = self.capabilities
        return self.cpu is not None or (model is not None and (model.backend in CPU_BACKENDS or "CPU" in model.devices))

    def share_cores(self, count: int) -> None:
        """Has the runner compute on at most ``count`` cores."""
        if count != self._cores and self._child is not None and self.capabilities is not None:
            self._cores = count
            self._child.send(Cores(count=count))

    def _note_activity(self) -> None:
        if self._busy != bool(self._machine.requests):
            self._busy = not self._busy
            self._on_activity()

    def loading(self) -> AsyncIterator[Status]:
        """See ``RunnerStateMachine.loading``."""
        return self._machine.loading()

    async def status_after(self, seen: Status | None) -> Status:
        """Waits until the status is not ``seen`` any more."""
        return await self._machine.status_after(seen)

    async def ready(self) -> Capabilities:
        """Waits until the model is loaded. Raises ``RunnerError``."""
        if self.capabilities is None:
            async for _ in self.loading():
                pass
        if self.capabilities is not None and self.status.state in SERVING:
            return self.capabilities
        raise RunnerError(await self.ended())

    async def ended(self) -> Failed:
        """Waits until the process is reaped, and returns why it ended."""
        await self._ended.wait()
        assert self.failure is not None
        return self.failure

    @asynccontextmanager
    async def generate(self, request: Generate, arrival: asyncio.Event | None = None) -> AsyncGenerator[RequestEvents]:
        """Sends the request and yields its events. Leaving before the terminal event cancels it without waiting.

        ``arrival`` is passed to ``RequestEvents``.
        If the runner dies, or is gone, the events end with ``Failed``. Raises ``ValueError`` for an id in use and
        ``RuntimeError`` before ``ready``.
        """
        events = RequestEvents(arrival)
        with self._in_flight(request, events):
            try:
                yield events
            finally:
                events.discard()

    @overload
    async def ask(self, command: Embed) -> Embedded: ...
    @overload
    async def ask(self, command: Rank) -> Ranked: ...
    @overload
    async def ask(self, command: Tokenize) -> Tokenized: ...
    async def ask(self, command: UnaryRequest) -> UnaryReply:
        """Sends a command and waits for its reply. Cancelling the wait cancels the command.

        Raises ``RunnerError`` for a refusal and for a runner that dies or is gone. ``died_of`` distinguishes the two:
        after a death, another runner may be asked. Raises ``ValueError`` and ``RuntimeError`` as ``generate``.
        """
        reply = PendingReply(REPLY_TYPES[type(command)])
        with self._in_flight(command, reply):
            event = await reply.wait()
        match event:
            case Failed():
                raise RunnerError(event)
            case Finished():
                raise RunnerError(Failed(id=event.id, code="shutdown", message="the runner cancelled the request"))
            case _:
                return event

    @contextmanager
    def _in_flight(self, request: Request, recipient: Recipient) -> Generator[None]:
        """Sends a request, whose events go to ``recipient``. On leaving, cancels it if it has not ended."""
        requests = self._machine.requests
        if request.id in requests:
            raise ValueError(f"request id {request.id!r} is in use")
        if self.failure is not None:
            recipient.put(for_request(self.failure, request.id))
        elif self._outbox is None or self.capabilities is None:
            raise RuntimeError(f"{request.type} before ready()")
        else:
            requests[request.id] = recipient  # before the command, so that no answer comes too early
            self._note_activity()
            self._outbox.post(request)
        try:
            yield
        finally:
            if requests.get(request.id) is recipient and self._child is not None:
                if self._outbox is not None and self._outbox.withdraw(request.id):
                    del requests[request.id]
                    self._note_activity()
                else:
                    self._child.send(Cancel(id=request.id))

    def _sending(self, request: Request) -> None:
        whole = isinstance(request, Generate) and not request.delivered
        self._timer.begin(request.id, asyncio.get_running_loop().time(), measured=whole)

    # --- ways to end it ---

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

    def displace(self, why: str) -> None:
        """Ends the runner at once. Its requests continue in another process of the same model."""
        self.displaced = Failed(code="runner_died", message=why)
        self._life.cancel()

    # --- its life ---

    async def run(
        self, after: Sequence["RunnerProcess"] = (), on_end: Callable[[Failed], None] = lambda _: None
    ) -> None:
        """Runs the process from start to end. Returns when it has ended; cancelling this kills the process.

        It begins when the processes ``after`` have ended and their memory is free. ``on_end`` gets the reason for the
        end before any request does.
        """
        failure = _SHUT_DOWN
        try:
            with self._life:
                for predecessor in after:
                    await predecessor.ended()
                failure = await self._live()
            if self.displaced is not None and not self._closing:
                failure = self.displaced
        except Exception as error:  # the server's own error ends this runner and no other
            log.exception("the server failed while it handled a runner, which is ended")
            failure = Failed(code="runner_died", message=f"the server failed while it handled the runner: {error!r}")
        finally:
            self.failure = failure
            now = asyncio.get_running_loop().time()
            with ExitStack() as steps:  # in reverse order, and all of them whichever fails: nobody may wait for ever
                steps.callback(self._ended.set)
                steps.callback(self._note_activity)
                steps.callback(self._machine.end, failure)
                steps.callback(self._timer.close, now)
                steps.callback(on_end, failure)

    async def _live(self) -> Failed:
        """Spawns, serves and reaps. Returns why the process ended."""
        try:
            log = StderrLog(self._log)
        except OSError as error:
            return Failed(code="runner_died", message=f"the runner's log cannot be opened: {error}")
        try:
            async with spawn(self._command, log) as child:
                self._child = child
                self._outbox = Outbox(child, self._sending, self._machine.take)
                await self._serve(child, self._outbox)
                how = f"was ended: {self._violation}" if self._violation else await child.exit()
        except OSError as error:
            return Failed(code="runner_died", message=f"{self._command[0]} could not be started: {error}")
        finally:
            log.close()
        return self._cause(how, log.last_lines())

    async def _serve(self, child: ChildProcess, outbox: Outbox) -> None:
        """Handles the runner's events until it closes its output or breaks the protocol or a deadline."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._cut_off_if_silent, child)
            tasks.start_soon(self._cut_off_if_late, child)
            tasks.start_soon(outbox.run)
            tasks.start_soon(self._load.run, child)
            try:
                await child.listen(self._on_event)
            except ProtocolError as error:
                self._violation = self._violation or str(error)
                self._culprit = error.request
            tasks.cancel_scope.cancel()

    def _on_event(self, event: Event) -> None:
        """Raises ``ProtocolError``."""
        self._watchdog.reset()
        now = asyncio.get_running_loop().time()
        if self._load.take(event, self.status, now):
            return
        if not self._greeted.is_set():
            self._handshake(event, now)
        elif isinstance(event, Deltas):
            self._machine.take(event)
            tokens = sum([len(delta.tokens) for delta in event.items])
            self.rate.add(tokens, now)
            self._timer.deltas(event.items, tokens, now)
        else:
            self._machine.take(event)
            self._timer.take(event, now)
            self._note_activity()
            if self.status.state in FINAL:
                self._final.set()

    def _handshake(self, first: Event, now: float) -> None:
        """A runner's first message is the status Idle; then it gets its load. Raises ``ProtocolError``."""
        assert self._child is not None
        self._greeted.set()
        match first:
            case Status(state="Idle"):
                self._load.begin(self._child, now)
            case Failed(id=None):
                self._machine.take(first)
                self._final.set()
            case _:
                raise ProtocolError(f"its first message was {first.type!r} instead of the status Idle")

    async def _cut_off_if_silent(self, child: ChildProcess) -> None:
        self._cut_off(child, await self._watchdog.expired(lambda: self.status.state in LOADING))

    async def _cut_off_if_late(self, child: ChildProcess) -> None:
        """Bounds the time to its first message, and the time from its final state to its exit."""
        with anyio.move_on_after(self._deadlines.handshake):
            await self._greeted.wait()
        if not self._greeted.is_set():
            self._cut_off(child, f"it sent nothing within {self._deadlines.handshake:g} seconds of its start")
            return
        await self._final.wait()
        await anyio.sleep(_EXIT_SECONDS)
        self._cut_off(child, f"it reported {self.status.state} and did not exit")

    def _cut_off(self, child: ChildProcess, violation: str) -> None:
        self._violation = self._violation or violation
        child.cut_off()

    def _cause(self, how: str, stderr: str) -> Failed:
        """Why the process ended: by the server's will, by its own report, or by ``how`` and its standard error."""
        if self._closing:
            return _SHUT_DOWN
        if (known := self.refused or self._machine.failure) is not None:
            return known
        failed = diagnose(how, stderr, loading=self.capabilities is None)
        if self._load.stalled and failed.code == "runner_died":  # another process would most likely hang as well
            return failed.model_copy(update={"code": "model_load_failed"})
        return failed
