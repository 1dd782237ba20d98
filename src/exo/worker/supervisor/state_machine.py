"""A runner's state, capabilities and unanswered requests, checked against the protocol. Pure: no process, no pipe."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from itertools import chain
from typing import Self, final

from exo.worker.protocol.commands import Embed, Rank, Tokenize
from exo.worker.protocol.events import (
    Capabilities,
    CpuUse,
    Delta,
    Deltas,
    Embedded,
    Estimated,
    Event,
    Failed,
    Finished,
    Heartbeat,
    PrefillProgress,
    PrefixUse,
    PromptLogprobs,
    Ranked,
    RunnerState,
    Status,
    Tokenized,
)
from exo.worker.protocol.wire import ProtocolError

ENDINGS: tuple[RunnerState, ...] = ("ShuttingDown", "Shutdown", "Failed")
_TRANSITIONS: dict[RunnerState, tuple[RunnerState, ...]] = {
    "Idle": ("Loading", *ENDINGS),
    "Loading": ("Loading", "Loaded", *ENDINGS),
    "Loaded": ("WarmingUp", "Ready", "Loading", *ENDINGS),
    "WarmingUp": ("Ready", "Loading", *ENDINGS),
    "Ready": ("Running", *ENDINGS),
    "Running": ("Ready", *ENDINGS),
    "ShuttingDown": ("Shutdown", "Failed"),
    "Shutdown": (),
    "Failed": ("Failed",),  # reported twice, as a Status and as a Failed without id, in either order
}
"""Every runner starts Idle, and its first message is that state. Any other transition is a protocol error.

A runner that has run out of memory returns to Loading.
"""

LOADING: tuple[RunnerState, ...] = ("Idle", "Loading", "Loaded", "WarmingUp")
SERVING: tuple[RunnerState, ...] = ("Ready", "Running")
FINAL: tuple[RunnerState, ...] = ("Shutdown", "Failed")

RequestEvent = PrefillProgress | PromptLogprobs | Delta | Finished | Failed

UnaryRequest = Embed | Rank | Tokenize
"""Commands with one reply and no side effects: after a runner's death another one may be asked."""
UnaryReply = Embedded | Ranked | Tokenized
REPLY_TYPES: dict[type[UnaryRequest], type[UnaryReply]] = {Embed: Embedded, Rank: Ranked, Tokenize: Tokenized}

_BOUND = 1024
"""Buffered events that cause a compaction."""


@final
class RequestEvents:
    """An asynchronous iterator for one reader: it ends after exactly one ``Finished`` or ``Failed``.

    Writing never waits, because the reader of a runner's pipe serves all its requests, and one slow client must not
    hold it up. A reader that lags gets fewer and larger deltas: a full buffer is compacted. It holds at most the
    tokens of one sequence, which the context length bounds, and loses nothing.
    """

    def __init__(self, arrival: asyncio.Event | None = None) -> None:
        """``arrival`` is set with each event. Several requests may share it, whose reader then calls ``take``."""
        self._buffer: deque[RequestEvent] = deque()
        self._arrival = asyncio.Event() if arrival is None else arrival
        self._open = True

    def put(self, event: RequestEvent) -> None:
        """Adds an event. Nothing may follow a terminal event."""
        if not self._open:
            return
        self._buffer.append(event)
        self._arrival.set()
        if len(self._buffer) >= _BOUND:
            self._compact()

    def take(self) -> list[RequestEvent]:
        """Returns the events that have arrived."""
        events = list(self._buffer)
        self._buffer.clear()
        return events

    def discard(self) -> None:
        """Drops the buffered events and all later ones: the reader has left."""
        self._open = False
        self._buffer.clear()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestEvent:
        """Waits only while the buffer is empty. Cancelling the wait loses nothing."""
        while not self._buffer:
            if not self._open:
                raise StopAsyncIteration
            self._arrival.clear()
            await self._arrival.wait()
        event = self._buffer.popleft()
        if isinstance(event, Finished | Failed):
            self._open = False
        return event

    def _compact(self) -> None:
        """Joins all deltas, joins the prompt's log-probabilities, and keeps the last progress and the terminal event.

        That order is the order in which a runner sends them.
        """
        events = tuple(self._buffer)
        deltas = [event for event in events if isinstance(event, Delta)]
        prompts = [event for event in events if isinstance(event, PromptLogprobs)]
        self._buffer.clear()
        self._buffer.extend([event for event in events if isinstance(event, PrefillProgress)][-1:])
        if prompts:
            items = tuple(item for event in prompts for item in event.items)
            self._buffer.append(prompts[0].model_copy(update={"items": items}))
        if deltas:
            tokens = tuple(token for delta in deltas for token in delta.tokens)
            logprobs = tuple(each for delta in deltas for each in delta.logprobs)
            text = "".join(delta.text for delta in deltas)
            self._buffer.append(Delta(id=deltas[0].id, tokens=tokens, text=text, logprobs=logprobs))
        self._buffer.extend(event for event in events if isinstance(event, Finished | Failed))


@final
class PendingReply:
    """Waits for the reply of type ``kind``, or for ``Failed``, or for ``Finished`` after a cancellation."""

    def __init__(self, kind: type[UnaryReply]) -> None:
        self.kind = kind
        self._parts: list[Tokenized] = []
        self._reply: asyncio.Future[UnaryReply | Finished | Failed] = asyncio.get_running_loop().create_future()

    def put(self, event: UnaryReply | PrefillProgress | Finished | Failed) -> None:
        """Takes an event. Progress is ignored; the parts of a ``Tokenized`` are joined."""
        match event:
            case PrefillProgress():
                return
            case Tokenized(more=True):
                self._parts.append(event)
                return
            case Tokenized() if self._parts:
                parts = [*self._parts, event]
                tokens = tuple(chain.from_iterable(part.tokens for part in parts))
                spelt = tuple(chain.from_iterable(part.bytes for part in parts))
                event = event.model_copy(update={"tokens": tokens, "bytes": spelt})
            case _:
                pass
        if not self._reply.done():
            self._reply.set_result(event)

    async def wait(self) -> UnaryReply | Finished | Failed:
        """The event that ended the request."""
        return await self._reply


Recipient = RequestEvents | PendingReply
"""Takes the events of one request."""


@final
class RunnerStateMachine:
    """``take`` is called with every event of the runner. ``step_seconds`` bounds the time in which a runner that has
    requests, in a slot or waiting, computes no step.
    """

    def __init__(self, step_seconds: float) -> None:
        self.status = Status(state="Idle")
        self.capabilities: Capabilities | None = None
        self.failure: Failed | None = None  # the runner's own report of why it failed
        self.requests: dict[str, Recipient] = {}  # those without a terminal event, by id
        self.cpu: CpuUse | None = None  # this and the next from the last heartbeat
        self.prefixes: PrefixUse | None = None
        self.produced_output = asyncio.Event()  # set by the first token, vector or score, which proves that it works
        self._step_seconds = step_seconds
        self._steps = (-1, 0.0)  # the last count of steps, and when it last changed
        self._changed = asyncio.Event()

    def loading(self) -> AsyncIterator[Status]:
        """The status now and after each change, until the runner is ready or gone.

        A slow reader misses statuses in between, never the last one. A cancelled wait loses nothing.
        """
        return _StatusChanges(self)

    async def status_after(self, seen: Status | None) -> Status:
        """Waits until the status is not ``seen`` any more."""
        while self.status is seen:
            await self._changed.wait()
        return self.status

    def take(self, event: Event) -> None:
        """Acts on an event. Raises ``ProtocolError`` for one that the protocol does not allow now."""
        match event:
            case Deltas(items=items):
                self.produced_output.set()
                for delta in items:
                    self._stream(delta.id).put(delta)
            case PrefillProgress(id=request):
                self._pending(request).put(event)
            case PromptLogprobs(id=request):
                self._stream(request).put(event)
            case Finished(id=request) | Failed(id=str(request)):
                self._pending(request).put(event)
                del self.requests[request]
            case Embedded() | Ranked() | Tokenized():
                self._take_reply(event)
            case Failed():
                self.failure = event
                self._enter(Status(state="Failed"))
            case Status():
                self._enter(event)
            case Heartbeat():
                self._take_heartbeat(event)
            case Estimated():
                raise ProtocolError("it sent an estimate that was not requested")

    def _take_reply(self, event: UnaryReply) -> None:
        reply = self._pending(event.id)
        if not isinstance(reply, PendingReply) or not isinstance(event, reply.kind):
            raise ProtocolError(f"it answered request {event.id!r} with {event.type!r}", event.id)
        reply.put(event)
        if not isinstance(event, Tokenized):
            self.produced_output.set()  # tokenizing proves nothing about the weights
        elif event.more:
            return
        del self.requests[event.id]

    def _stream(self, request: str) -> RequestEvents:
        events = self._pending(request)
        if not isinstance(events, RequestEvents):
            raise ProtocolError(f"it streams to request {request!r}, which takes a single reply", request)
        return events

    def _pending(self, request: str) -> Recipient:
        try:
            return self.requests[request]
        except KeyError:
            raise ProtocolError(f"it sent an event of request {request!r}, which it does not have") from None

    def _enter(self, status: Status) -> None:
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

    def _take_heartbeat(self, beat: Heartbeat) -> None:
        """Raises ``ProtocolError`` if the runner has work and its loop makes no steps.

        ``self.requests`` counts as work: a runner that lost a request reports neither active nor waiting sequences.
        """
        self.cpu, self.prefixes = beat.cpu, beat.prefixes
        steps, since = self._steps
        now = time.monotonic()
        if beat.steps != steps or not (beat.active or beat.waiting or self.requests):
            self._steps = beat.steps, now
        elif now - since > self._step_seconds:
            raise ProtocolError(f"it has computed nothing for {self._step_seconds:g} seconds, with requests to serve")

    def end(self, failure: Failed) -> None:
        """Fails every pending request: the process is gone."""
        if self.status.state not in FINAL:
            self._enter(Status(state="Shutdown" if failure.code == "shutdown" else "Failed"))
        for request, recipient in self.requests.items():
            recipient.put(for_request(failure, request))
        self.requests.clear()


def for_request(failure: Failed, request: str | None) -> Failed:
    """The failure of a runner as that of one of its requests."""
    return failure.model_copy(update={"id": request})


@final
class _StatusChanges(AsyncIterator[Status]):
    """An iterator and not an asynchronous generator, because cancelling a wait would end a generator."""

    def __init__(self, machine: RunnerStateMachine) -> None:
        self._machine = machine
        self._seen: Status | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Status:
        status = await self._machine.status_after(self._seen)
        if status.state not in LOADING:
            raise StopAsyncIteration
        self._seen = status
        return status
