"""One runner: a process with one loaded model, and everything that the server knows about it."""

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import final, overload

import anyio

from exo.worker.protocol.cores import CPU_BACKENDS
from exo.worker.protocol.messages import (
    Cancel,
    Capabilities,
    Cores,
    CpuUse,
    Deltas,
    Embed,
    Embedded,
    Estimate,
    Estimated,
    Event,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    Load,
    LoadOption,
    Rank,
    Ranked,
    Request,
    Shutdown,
    Status,
    Tokenize,
    Tokenized,
)
from exo.worker.supervisor.child_process import ChildProcess, ProtocolError, StderrLog, spawn
from exo.worker.supervisor.crash_report import diagnose
from exo.worker.supervisor.outbox import Outbox
from exo.worker.supervisor.pending_events import RequestEvents
from exo.worker.supervisor.pending_reply import REPLY_TYPES, PendingReply, UnaryReply, UnaryRequest
from exo.worker.supervisor.request_timer import RequestCount, RequestTimer
from exo.worker.supervisor.state_machine import FINAL, LOADING, SERVING, Recipient, RunnerStateMachine, for_request
from exo.worker.supervisor.token_rate import TokenRate
from exo.worker.supervisor.watchdog import DEADLINES, Deadlines, HeartbeatWatchdog, LoadProgress

log = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 2.0
"""How long a runner whose state is final may go on talking before its process is ended."""


class RunnerError(Exception):
    """The runner cannot serve: it did not start, could not load, died or was shut down. ``failed`` says why.

    ``retry_seconds`` tells when to try again, where that is known to make sense.
    """

    def __init__(self, failed: Failed, retry_seconds: float | None = None) -> None:
        super().__init__(failed.message)
        self.failed = failed
        self.retry_seconds = retry_seconds


Admit = Callable[[Estimated], Awaitable[LoadOption]]
"""Waits until there is memory, and says for which choice. Raises ``RunnerError`` where there will not be any."""


@final
class RunnerProcess:
    """Starts ``command`` and has it execute ``load``; standard error goes to the file ``log``.

    With ``admit`` the runner is first asked what loading takes, and loads once that is granted. ``stopwatch`` learns
    what measures it.
    ``run`` is the process's whole life, from spawning to reaping, and must be started once, in a task group that
    outlives every request. Everything else may be called from any task of the same event loop.
    """

    def __init__(
        self,
        command: Sequence[str],
        load: Load,
        log: Path,
        deadlines: Deadlines = DEADLINES,
        admit: Admit | None = None,
        stopwatch: RequestTimer | None = None,
        on_activity: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_activity`` is called when the runner gets its first request, and when it has none any more."""
        self._command = tuple(command)
        self._admit = admit
        self._refused: Failed | None = None
        """Why the runner was not let load."""
        self._displaced: Failed | None = None
        """Why the runner had to go although it worked."""
        self._estimate: asyncio.Future[Estimated] = asyncio.get_running_loop().create_future()
        """What loading takes, where the runner is asked."""
        self._greeted, self._final = asyncio.Event(), asyncio.Event()
        """The runner has said its first word; it has said that it ends."""
        self._load = load
        self._log = log
        self._deadlines = deadlines
        self._silence = HeartbeatWatchdog(deadlines)
        self._progress: LoadProgress | None = None
        """Of the estimate or the load that is going on."""
        self._stalled = False
        """It was ended because that made none."""
        self._conversation = RunnerStateMachine(deadlines.step)
        self._life = anyio.CancelScope()
        self._child: ChildProcess | None = None
        self._outbox: Outbox | None = None
        self._closing = False
        self._failure: Failed | None = None
        self._ended = anyio.Event()
        self._culprit: str | None = None
        self.produced_output = self._conversation.produced_output
        """Set with the first token or vector that the runner computes: it loads, and it works."""
        self.rate = TokenRate()
        """Of the tokens that it delivers."""
        self._stopwatch = stopwatch or RequestTimer(RequestCount(), lambda _: None)
        self._on_activity = on_activity
        self._busy = False
        self._cores: int | None = None
        """The share of the CPU that the runner was told last."""

    @property
    def status(self) -> Status:
        """What the runner said last of its state; "Failed" or "Shutdown" once it is gone."""
        return self._conversation.status

    @property
    def capabilities(self) -> Capabilities | None:
        """What the runner can do, from its first "Ready" on."""
        return self._conversation.capabilities

    @property
    def failure(self) -> Failed | None:
        """Why the process is gone, or None while it exists."""
        return self._failure

    @property
    def pid(self) -> int | None:
        """The number of the process while there is one."""
        return None if self._child is None or self._failure is not None else self._child.pid

    @property
    def began(self) -> bool:
        """Whether it has been started, which it is once those before it have ended."""
        return self._child is not None

    @property
    def refused(self) -> bool:
        """Whether it ended because there was no memory for its model, which says nothing about the runner."""
        return self._refused is not None

    @property
    def displaced(self) -> bool:
        """Whether it had to go although it worked, so that whatever it was to do is to be done by another."""
        return self._displaced is not None

    def died_of(self, failed: Failed) -> bool:
        """Whether this failure of a request is the process's own, and says nothing about the request."""
        return self._failure is not None and failed == for_request(self._failure, failed.id)

    def blames(self, request: str | None) -> bool:
        """Whether the process was ended because its answer to this request broke the protocol: another's may, too."""
        return self._culprit is not None and request == self._culprit

    @property
    def pending(self) -> int:
        """Requests whose terminal event the runner still owes."""
        return len(self._conversation.requests)

    @property
    def cpu(self) -> CpuUse | None:
        """How it uses the CPU, as far as it tells."""
        return self._conversation.cpu

    @property
    def computes_on_cpu(self) -> bool:
        """Whether it needs cores while it has requests."""
        model = self.capabilities
        return self.cpu is not None or (model is not None and (model.backend in CPU_BACKENDS or "CPU" in model.devices))

    def share_cores(self, count: int) -> None:
        """Has the runner compute on so many cores at most."""
        if count != self._cores and self._child is not None and self.capabilities is not None:
            self._cores = count
            self._child.send(Cores(count=count))

    def _note_activity(self) -> None:
        if self._busy != bool(self._conversation.requests):
            self._busy = not self._busy
            self._on_activity()

    def loading(self) -> AsyncIterator[Status]:
        """The status now and after each change, until the runner is ready or gone.

        Any number of tasks may watch. A slow one misses statuses in between, never the last. Cancelling a wait, for
        instance by a timeout, loses nothing: the iteration can go on.
        """
        return self._conversation.loading()

    async def status_after(self, seen: Status | None) -> Status:
        """Waits until the status is another one than ``seen``."""
        return await self._conversation.status_after(seen)

    async def ready(self) -> Capabilities:
        """Waits until the model is loaded. Raises ``RunnerError``."""
        if self.capabilities is None:
            async for _ in self.loading():
                pass
        if self.capabilities is not None and self.status.state in SERVING:
            return self.capabilities
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
        events = RequestEvents()
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
        """Sends a command that has one answer and waits for it. Cancelling the wait cancels the command.

        Raises ``RunnerError`` for a refusal and for a runner that dies or is gone already; ``died_of`` tells which, and
        after a death the same may be asked of another. Raises ``ValueError`` and ``RuntimeError`` as ``generate`` does.
        """
        answer = PendingReply(REPLY_TYPES[type(command)])
        with self._in_flight(command, answer):
            event = await answer.wait()
        match event:
            case Failed():
                raise RunnerError(event)
            case Finished():
                raise RunnerError(Failed(id=event.id, code="shutdown", message="the runner cancelled the request"))
            case _:
                return event

    @contextmanager
    def _in_flight(self, request: Request, recipient: Recipient) -> Generator[None]:
        """Sends a request, whose events go to ``recipient``, and cancels it on leaving if it has not ended."""
        requests = self._conversation.requests
        if request.id in requests:
            raise ValueError(f"request id {request.id!r} is in use")
        if self._failure is not None:
            recipient.put(for_request(self._failure, request.id))
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
        self._stopwatch.begin(request.id, asyncio.get_running_loop().time(), measured=whole)

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
        """Ends the runner at once; its requests are to go on in another process of the same model."""
        self._displaced = Failed(code="runner_died", message=why)
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
            if self._displaced is not None and not self._closing:
                failure = self._displaced
        except Exception as error:  # a mistake of the server's own ends this runner and no other
            log.exception("the server failed in its dealings with a runner, which is ended")
            reason = f"the server failed in its dealings with the runner: {error!r}"
            failure = Failed(code="runner_died", message=reason)
        finally:
            self._end(failure, on_end)

    async def _live(self) -> Failed:
        """Spawns, serves and reaps. Returns why the process ended."""
        try:
            log = StderrLog(self._log)
        except OSError as error:
            return Failed(code="runner_died", message=f"the runner's log cannot be opened: {error}")
        try:
            async with spawn(self._command, log) as child:
                self._child = child
                self._outbox = Outbox(child, self._sending, self._conversation.take)
                broke = await self._serve(child)
                how = f"was ended: {broke}" if broke else await child.exit()
        except OSError as error:
            return Failed(code="runner_died", message=f"{self._command[0]} could not be started: {error}")
        finally:
            log.close()
        return self._diagnosis(how, log.last_lines())

    async def _serve(self, child: ChildProcess) -> str | None:
        """Hears the runner out, from its first word to its last. Returns what was wrong with it, if anything."""
        verdict: list[str] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._cut_off_if_silent, child, verdict)
            tasks.start_soon(self._cut_off_if_late, child, verdict)
            assert self._outbox is not None
            tasks.start_soon(self._outbox.run)
            if self._admit is not None:
                tasks.start_soon(self._load_when_admitted, child, self._admit)
            try:
                await child.listen(self._hear)
            except ProtocolError as error:
                verdict.append(str(error))
                self._culprit = error.request
            tasks.cancel_scope.cancel()
        return next(iter(verdict), None)

    def _hear(self, event: Event) -> None:
        """Acts on a word of the runner's. Raises ``ProtocolError``."""
        self._silence.end()
        if self._progress is not None:
            self._follow(event, self._progress)
        if not self._greeted.is_set():
            self._greet(event)
        elif isinstance(event, Deltas):
            self._conversation.take(event)
            tokens, now = sum([len(delta.tokens) for delta in event.items]), asyncio.get_running_loop().time()
            self.rate.add(tokens, now)
            self._stopwatch.deltas(event.items, tokens, now)
        elif isinstance(event, Estimated) and self._admit is not None and not self._estimate.done():
            self._estimate.set_result(event)
        else:
            self._conversation.take(event)
            self._stopwatch.take(event, asyncio.get_running_loop().time())
            self._note_activity()
            if self.status.state in FINAL:
                self._final.set()

    def _follow(self, event: Event, progress: LoadProgress) -> None:
        """Notes what ``event`` tells of the estimate or load. Raises ``ProtocolError`` if that makes no progress."""
        match event:
            case Estimated() | Status(capabilities=Capabilities()):
                self._progress = None
            case Status(state=state, layers_loaded=layers):
                if (state, layers) != (self.status.state, self.status.layers_loaded):
                    progress.report()
            case Heartbeat():
                wrong = progress.beat(event, asyncio.get_running_loop().time())
                if wrong is not None:
                    self._stalled = True
                    raise ProtocolError(f"{wrong} {self._doing()}")
            case _:
                pass

    def _doing(self) -> str:
        """What has made no progress."""
        match self.status:
            case Status(state="Idle"):
                started = self._admit is None or self._estimate.done()
                return "after it was told to load" if started else "while it estimated the memory that loading takes"
            case Status(state=state, layers_loaded=done, total_layers=total) if total:
                return f"in the state {state} ({done} of {total})"
            case Status(state=state):
                return f"in the state {state}"

    def _tell(self, command: Estimate | Load) -> None:
        """Has the runner estimate or load."""
        assert self._child is not None
        self._progress = LoadProgress(self._deadlines, asyncio.get_running_loop().time())
        self._child.send(command)

    def _greet(self, first: Event) -> None:
        """The handshake: a runner says Idle, and is told what to load. Raises ``ProtocolError``."""
        self._greeted.set()
        match first:
            case Status(state="Idle"):
                self._tell(self._load if self._admit is None else Estimate(load=self._load))
            case Failed(id=None):
                self._conversation.take(first)
                self._final.set()
            case _:
                raise ProtocolError(f"its first message was {first.type!r} instead of the status Idle")

    async def _load_when_admitted(self, child: ChildProcess, admit: Admit) -> None:
        try:
            choice = await admit(await self._estimate)
        except RunnerError as error:
            self._refused = error.failed
            child.signal(signal.SIGKILL)
        else:
            table = {**self._load.table, **choice.settings}
            self._tell(self._load.model_copy(update={"table": table}))

    async def _cut_off_if_silent(self, child: ChildProcess, verdict: list[str]) -> None:
        verdict.append(f"it {await self._silence.too_long(lambda: self.status.state in LOADING)}")
        child.cut_off()

    async def _cut_off_if_late(self, child: ChildProcess, verdict: list[str]) -> None:
        """Its first word may be long in coming, and the time between its last one and its exit."""
        with anyio.move_on_after(self._deadlines.handshake):
            await self._greeted.wait()
        if self._greeted.is_set():
            await self._final.wait()
            await anyio.sleep(_LAST_WORDS_SECONDS)
            verdict.append(f"it said {self.status.state} and did not exit")
        else:
            verdict.append(f"it said nothing within {self._deadlines.handshake:g} seconds of its start")
        child.cut_off()

    def _diagnosis(self, how: str, stderr: str) -> Failed:
        if self._closing:
            return Failed(code="shutdown", message="the runner was shut down")
        if self._refused is not None:
            return self._refused
        if self._conversation.last_word is not None:
            return self._conversation.last_word
        failed = diagnose(how, stderr)
        if self._stalled and failed.code == "runner_died":  # another process would most likely hang alike
            return failed.model_copy(update={"code": "model_load_failed"})
        return failed

    def _end(self, failure: Failed, on_end: Callable[[Failed], None]) -> None:
        self._failure = failure
        with ExitStack() as steps:  # in reverse order, and all of them, whichever fails, so that nobody waits for ever
            steps.callback(self._ended.set)
            steps.callback(self._note_activity)
            steps.callback(self._conversation.end, failure)
            steps.callback(self._stopwatch.close, asyncio.get_running_loop().time())
            steps.callback(on_end, failure)
