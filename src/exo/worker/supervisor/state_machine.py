"""What a runner has said, held against the contract: its state, what it can do, and the requests that it has."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Self, final

from exo.worker.protocol.messages import (
    Capabilities,
    CpuUse,
    Deltas,
    Embedded,
    Estimated,
    Event,
    Failed,
    Finished,
    Heartbeat,
    PrefillProgress,
    PromptLogprobs,
    Ranked,
    RunnerState,
    Status,
    Tokenized,
)
from exo.worker.supervisor.child_process import ProtocolError
from exo.worker.supervisor.pending_events import RequestEvents
from exo.worker.supervisor.pending_reply import PendingReply, UnaryReply

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

LOADING: tuple[RunnerState, ...] = ("Idle", "Loading", "Loaded", "WarmingUp")
SERVING: tuple[RunnerState, ...] = ("Ready", "Running")
FINAL: tuple[RunnerState, ...] = ("Shutdown", "Failed")

Recipient = RequestEvents | PendingReply
"""Where the events of one request go."""


@final
class RunnerStateMachine:
    """With one runner, from its first word to its last. Knows of no process and no pipe.

    ``step_seconds`` is how long a runner may compute nothing while it has requests, in a slot or waiting.
    """

    def __init__(self, step_seconds: float) -> None:
        self.status = Status(state="Idle")
        self.capabilities: Capabilities | None = None
        self.last_word: Failed | None = None
        """Why the runner itself failed, if it said so."""
        self.requests: dict[str, Recipient] = {}
        """Those whose terminal event the runner still owes, by id."""
        self.cpu: CpuUse | None = None
        """From the last heartbeat."""
        self.produced_output = asyncio.Event()
        """Set with the first token or vector that the runner computes: it loads, and it works."""
        self._step_seconds = step_seconds
        self._steps = (-1, 0.0)
        self._changed = asyncio.Event()

    def loading(self) -> AsyncIterator[Status]:
        """The status now and after each change, until the runner is ready or gone."""
        return _Loading(self)

    async def status_after(self, seen: Status | None) -> Status:
        """Waits until the status is another one than ``seen``."""
        while self.status is seen:
            await self._changed.wait()
        return self.status

    def take(self, event: Event) -> None:
        """Acts on what the runner says. Raises ``ProtocolError`` for what the contract does not allow."""
        match event:
            case Deltas(items=items):
                self.produced_output.set()
                for delta in items:
                    self._stream(delta.id).put(delta)
            case PrefillProgress(id=request):
                self._owed(request).put(event)
            case PromptLogprobs(id=request):
                self._stream(request).put(event)
            case Finished(id=request) | Failed(id=str(request)):
                self._owed(request).put(event)
                del self.requests[request]
            case Embedded() | Ranked() | Tokenized():
                self._take_answer(event)
            case Failed():
                self.last_word = event
                self.enter(Status(state="Failed"))
            case Status():
                self.enter(event)
            case Heartbeat():
                self._on_heartbeat(event)
            case Estimated():
                raise ProtocolError("it told an estimate, which it was not asked for")

    def _take_answer(self, event: UnaryReply) -> None:
        answer = self._owed(event.id)
        if not isinstance(answer, PendingReply) or not isinstance(event, answer.kind):
            raise ProtocolError(f"it answered request {event.id!r} with {event.type!r}", event.id)
        answer.put(event)
        if isinstance(event, Tokenized):
            if event.more:
                return
        else:
            self.produced_output.set()
        del self.requests[event.id]

    def _stream(self, request: str) -> RequestEvents:
        events = self._owed(request)
        if not isinstance(events, RequestEvents):
            raise ProtocolError(f"it streams to request {request!r}, which has one answer", request)
        return events

    def _owed(self, request: str) -> RequestEvents | PendingReply:
        try:
            return self.requests[request]
        except KeyError:
            raise ProtocolError(f"it spoke of request {request!r}, which it does not have") from None

    def enter(self, status: Status) -> None:
        """The only writer of the state. Raises ``ProtocolError``."""
        if status.state not in _TRANSITIONS[self.status.state]:
            raise ProtocolError(f"it went from {self.status.state} to {status.state}")
        due = status.state == "Ready" and self.capabilities is None
        if due != (status.capabilities is not None):
            raise ProtocolError("capabilities must come with the first Ready, and only then")
        self.status = status
        self.capabilities = status.capabilities or self.capabilities
        self._changed.set()
        self._changed = asyncio.Event()

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        """Raises ``ProtocolError`` for a loop that has something to compute and stands still."""
        self.cpu = beat.cpu
        steps, since = self._steps
        now = time.monotonic()
        if beat.steps != steps or not (beat.active or beat.waiting or self.requests):
            self._steps = beat.steps, now
        elif now - since > self._step_seconds:
            raise ProtocolError(f"it has computed nothing for {self._step_seconds:g} seconds, with requests to serve")

    def end(self, failure: Failed) -> None:
        """The runner is gone, and every request that it had has failed."""
        if self.status.state not in FINAL:
            self.enter(Status(state="Shutdown" if failure.code == "shutdown" else "Failed"))
        for request, recipient in self.requests.items():
            recipient.put(for_request(failure, request))
        self.requests.clear()


def for_request(failure: Failed, request: str | None) -> Failed:
    """The failure of a runner as that of one of its requests."""
    return failure.model_copy(update={"id": request})


@final
class _Loading(AsyncIterator[Status]):
    """See ``RunnerStateMachine.loading``."""

    def __init__(self, conversation: RunnerStateMachine) -> None:
        self._conversation = conversation
        self._seen: Status | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Status:
        status = await self._conversation.status_after(self._seen)
        if status.state not in LOADING:
            raise StopAsyncIteration
        self._seen = status
        return status
