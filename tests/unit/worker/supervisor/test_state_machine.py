"""The state machine of a runner by itself: every transition, and the events of its requests."""

from typing import get_args

import pytest

from exo.worker.protocol.events import (
    Capabilities,
    Delta,
    Deltas,
    Embedded,
    Failed,
    Finished,
    Heartbeat,
    RunnerState,
    Status,
    Tokenized,
    Usage,
)
from exo.worker.protocol.wire import ProtocolError
from exo.worker.supervisor.state_machine import PendingReply, RequestEvents, RunnerStateMachine

CAPABILITIES = Capabilities(engine="x", engine_version="1", backend="x", context_length=9, slots=1, vocabulary=9)
USAGE = Usage(prompt_tokens=1, completion_tokens=1)
WAY: tuple[RunnerState, ...] = ("Loading", "Loaded", "WarmingUp", "Ready", "Running")
ENDINGS = {"ShuttingDown", "Shutdown", "Failed"}
ALLOWED = {
    "Idle": {"Loading"} | ENDINGS,
    "Loading": {"Loading", "Loaded"} | ENDINGS,
    "Loaded": {"WarmingUp", "Ready", "Loading"} | ENDINGS,
    "WarmingUp": {"Ready", "Loading"} | ENDINGS,
    "Ready": {"Running"} | ENDINGS,
    "Running": {"Ready"} | ENDINGS,
    "ShuttingDown": {"Shutdown", "Failed"},
    "Shutdown": set[str](),
    "Failed": {"Failed"},
}


def status(machine: RunnerStateMachine, state: RunnerState) -> Status:
    first = state == "Ready" and machine.capabilities is None
    return Status(state=state, capabilities=CAPABILITIES if first else None)


def machine_in(state: RunnerState) -> RunnerStateMachine:
    machine = RunnerStateMachine(step_seconds=1000)
    way = WAY[: WAY.index(state) + 1] if state in WAY else () if state == "Idle" else (state,)
    for each in way:
        machine.take(status(machine, each))
    assert machine.status.state == state
    return machine


@pytest.mark.parametrize("after", get_args(RunnerState))
@pytest.mark.parametrize("before", get_args(RunnerState))
async def test_each_transition_is_allowed_or_a_protocol_error(before: RunnerState, after: RunnerState) -> None:
    machine = machine_in(before)
    event = status(machine, after)
    if after in ALLOWED[before]:
        machine.take(event)
        assert machine.status is event
    else:
        with pytest.raises(ProtocolError, match=f"it went from {before} to {after}"):
            machine.take(event)
        assert machine.status.state == before


async def test_capabilities_come_with_the_first_ready_and_only_then() -> None:
    with pytest.raises(ProtocolError, match="capabilities"):
        machine_in("Loaded").take(Status(state="Ready"))
    with pytest.raises(ProtocolError, match="capabilities"):
        machine_in("Running").take(Status(state="Ready", capabilities=CAPABILITIES))


async def test_a_request_gets_its_events_up_to_the_terminal_one() -> None:
    machine, events = machine_in("Running"), RequestEvents()
    machine.requests["a"] = events
    delta, finished = Delta(id="a", tokens=(1,), text="x"), Finished(id="a", reason="stop", usage=USAGE)
    machine.take(Deltas(items=(delta,)))
    assert machine.produced_output.is_set()
    machine.take(finished)
    assert [event async for event in events] == [delta, finished]
    with pytest.raises(ProtocolError, match="request 'a', which it does not have"):
        machine.take(finished)


async def test_a_reply_of_another_type_is_a_protocol_error_that_names_the_request() -> None:
    machine = machine_in("Running")
    machine.requests["a"] = PendingReply(Embedded)
    with pytest.raises(ProtocolError, match="answered request 'a' with 'tokenized'") as caught:
        machine.take(Tokenized(id="a", tokens=(), bytes=()))
    assert caught.value.request == "a"
    with pytest.raises(ProtocolError, match="streams to request 'a'"):
        machine.take(Deltas(items=(Delta(id="a", tokens=(1,), text=""),)))


async def test_the_parts_of_a_reply_are_joined_and_prove_nothing_about_the_model() -> None:
    machine, reply = machine_in("Running"), PendingReply(Tokenized)
    machine.requests["a"] = reply
    machine.take(Tokenized(id="a", tokens=(1,), bytes=((2,),), more=True))
    assert "a" in machine.requests
    machine.take(Tokenized(id="a", tokens=(3,), bytes=((4,),)))
    assert await reply.wait() == Tokenized(id="a", tokens=(1, 3), bytes=((2,), (4,)))
    assert not machine.requests
    assert not machine.produced_output.is_set()


async def test_a_runner_with_requests_that_makes_no_step_is_stuck() -> None:
    machine = RunnerStateMachine(step_seconds=-1)  # any time is too long
    idle = Heartbeat(steps=5, active=0, waiting=0)
    for _ in range(3):
        machine.take(idle)
    machine.requests["lost by the runner"] = RequestEvents()
    machine.take(idle.model_copy(update={"steps": 6}))
    with pytest.raises(ProtocolError, match="computed nothing"):
        machine.take(idle.model_copy(update={"steps": 6}))


async def test_the_end_fails_every_pending_request() -> None:
    machine, events, reply = machine_in("Running"), RequestEvents(), PendingReply(Embedded)
    machine.requests.update(a=events, b=reply)
    machine.end(Failed(code="runner_died", message="why"))
    assert machine.status.state == "Failed"
    assert [event async for event in events] == [Failed(id="a", code="runner_died", message="why")]
    assert await reply.wait() == Failed(id="b", code="runner_died", message="why")
    assert not machine.requests
