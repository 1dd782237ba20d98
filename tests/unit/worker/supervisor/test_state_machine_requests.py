import anyio
import pytest

from exo.worker.protocol.events import (
    Delta,
    Failed,
    Finished,
    Logprob,
    PrefillProgress,
    PromptLogprobs,
    TokenLogprobs,
    Usage,
)
from exo.worker.supervisor.state_machine import RequestEvent, RequestEvents

END = Finished(id="r", reason="stop", usage=Usage(prompt_tokens=9, completion_tokens=5000), text="!")


def prefill(processed: int) -> PrefillProgress:
    return PrefillProgress(id="r", processed=processed, total=5000)


def delta(number: int) -> Delta:
    return Delta(id="r", tokens=(number,), text=f"{number} ")


async def read(events: RequestEvents) -> list[RequestEvent]:
    return [event async for event in events]


async def test_events_come_in_order_and_end_with_the_terminal_one() -> None:
    events = RequestEvents()
    sent = [prefill(0), prefill(5), delta(0), delta(1), END]
    for event in sent:
        events.put(event)
    assert await read(events) == sent
    assert await read(events) == []


@pytest.mark.parametrize("end", [END, Failed(id="r", code="runner_died", message="gone")])
async def test_a_reader_that_never_reads_costs_no_more_than_the_text(end: Finished | Failed) -> None:
    events = RequestEvents()
    for number in range(5000):
        events.put(prefill(number))
    for number in range(5000):
        events.put(delta(number))
    events.put(end)
    received = await read(events)
    assert len(received) < 1100
    assert received[0] == prefill(4999)
    deltas = [event for event in received if isinstance(event, Delta)]
    assert received == [prefill(4999), *deltas, end]
    assert [token for each in deltas for token in each.tokens] == list(range(5000))
    assert "".join(each.text for each in deltas) == "".join(f"{number} " for number in range(5000))


async def test_a_reader_that_never_reads_loses_no_logprobs() -> None:
    def told(token: int) -> TokenLogprobs:
        return TokenLogprobs(chosen=Logprob(token=token, bytes=(97,), logprob=-float(token)))

    events = RequestEvents()
    prompt = PromptLogprobs(id="r", items=(told(1), told(2)))
    events.put(prefill(9))
    events.put(prompt)
    for number in range(3000):
        events.put(delta(number).model_copy(update={"logprobs": (told(number),)}))
    events.put(END)
    received = await read(events)
    assert received[:2] == [prefill(9), prompt]
    deltas = [event for event in received if isinstance(event, Delta)]
    assert [each.chosen.token for delta in deltas for each in delta.logprobs] == list(range(3000))


async def test_an_event_wakes_the_reader_and_a_wait_that_is_cancelled_loses_nothing() -> None:
    events = RequestEvents()
    with anyio.CancelScope() as wait:
        wait.cancel()
        await anext(events)
    assert wait.cancelled_caught

    async def write() -> None:
        events.put(delta(7))
        await anyio.lowlevel.checkpoint()
        events.put(END)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        assert await read(events) == [delta(7), END]


async def test_what_comes_after_the_reader_has_left_is_dropped() -> None:
    events = RequestEvents()
    events.put(delta(1))
    events.discard()
    events.put(delta(2))
    events.put(END)
    assert await read(events) == []
