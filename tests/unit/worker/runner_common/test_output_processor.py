"""The events of requests: text, counts, and one terminal event each, whatever the engine still does."""

import io
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo.worker.protocol.events import (
    Delta,
    Deltas,
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    Heartbeat,
    PrefillProgress,
    PromptLogprobs,
    Status,
    Usage,
)
from exo.worker.protocol.messages import PART_LOGPROBS
from exo.worker.protocol.wire import decode_event
from exo.worker.runner_common.output_processor import (
    LEAST_LOGPROB,
    PART_DELTAS,
    Accepted,
    Cancelled,
    Emitter,
    Item,
    PromptScored,
    Sampled,
    Scores,
    StepDone,
    TextAccepted,
)
from exo.worker.runner_common.request_checks import resume
from tests.support.bytes_vocabulary import CONTROL, END, BytesVocabulary
from tests.support.program import ask

PROMPT = 5
LIMIT = 1000


def accepted(name: str, *stop: str, delivered: Iterable[int] = (), show_special: bool = False) -> Accepted:
    request = ask(name, stop=stop).model_copy(update={"delivered": tuple(delivered), "show_special": show_special})
    resumed = resume(request, PROMPT, LIMIT, BytesVocabulary())
    return Accepted(name, PROMPT, len(request.delivered), resumed, show_special)


def step(*sampled: Sampled, ended: Iterable[tuple[str, FinishReason]] = ()) -> StepDone:
    return StepDone([], [], list(sampled), ended=list(ended))


def token(name: str, number: int, reason: FinishReason | None = None, scores: Scores | None = None) -> Sampled:
    return Sampled(name, number, reason, scores)


def said(name: str, text: str) -> list[StepDone]:
    return [step(token(name, byte)) for byte in text.encode()]


def written(*items: Item, stop_engine: Callable[[str], None] = lambda _: None) -> list[Event]:
    """The events that the items come to; heartbeats, which depend on the time, are left out."""
    protocol = io.BytesIO()
    emitter = Emitter(protocol)
    emitter.vocabulary = BytesVocabulary()
    emitter.stop_engine = stop_engine
    emitter.start()
    for item in items:
        emitter.put(item)
    emitter.close()
    events = [decode_event(line) for line in protocol.getvalue().splitlines()]
    return [event for event in events if not isinstance(event, Heartbeat)]


def deltas(events: Iterable[Event], name: str) -> list[Delta]:
    return [delta for event in events if isinstance(event, Deltas) for delta in event.items if delta.id == name]


def finished(events: Iterable[Event], name: str) -> Finished:
    [event] = [event for event in events if isinstance(event, Finished) and event.id == name]
    return event


def text(events: list[Event], name: str) -> str:
    return "".join(delta.text for delta in deltas(events, name)) + finished(events, name).text


def test_a_request_s_events_in_order() -> None:
    first, second = StepDone([("a", 2)], [("a", 4)]), StepDone([], [("a", PROMPT)], [token("a", ord("x"))])
    events = written(accepted("a"), first, second, step(token("a", ord("y"), "length")))
    assert events == [
        Status(state="Running"),
        PrefillProgress(id="a", processed=0, total=PROMPT),
        PrefillProgress(id="a", processed=4, total=PROMPT),
        PrefillProgress(id="a", processed=PROMPT, total=PROMPT),
        Deltas(items=(Delta(id="a", tokens=(ord("x"),), text="x"),)),
        Deltas(items=(Delta(id="a", tokens=(ord("y"),), text="y"),)),
        Finished(id="a", reason="length", usage=Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=2)),
        Status(state="Ready"),
    ]


def test_the_runner_is_running_while_any_request_is_open_and_then_ready() -> None:
    ends = [step(token("a", 65, "length")), step(token("b", 65, "length"))]
    events = written(accepted("a"), accepted("b"), *ends, accepted("c"), Cancelled("c"))
    assert [event.state for event in events if isinstance(event, Status)] == ["Running", "Ready", "Running", "Ready"]
    assert events.index(finished(events, "b")) + 1 == events.index(Status(state="Ready"))


def test_a_runner_that_is_leaving_is_not_ready_again() -> None:
    events = written(accepted("a"), Status(state="ShuttingDown"), Cancelled("a"))
    assert [event.state for event in events if isinstance(event, Status)] == ["Running", "ShuttingDown"]


def test_a_stop_string_over_several_tokens_ends_the_request_and_the_engine_s_work() -> None:
    told: list[str] = []
    events = written(accepted("a", "END"), *said("a", "no EN END or more"), stop_engine=told.append)
    assert text(events, "a") == "no EN "
    end = finished(events, "a")
    assert (end.reason, end.stop, end.usage.completion_tokens) == ("stop", "END", len("no EN END"))
    assert told == ["a"]
    assert len(deltas(events, "a")) == len("no EN END")


def test_a_stop_string_wins_over_the_engine_s_own_reason_which_has_ended_its_work() -> None:
    told: list[str] = []
    events = written(accepted("a", "x"), step(token("a", ord("x"), "length")), stop_engine=told.append)
    assert (finished(events, "a").reason, finished(events, "a").stop) == ("stop", "x")
    assert told == []


def test_what_is_held_back_comes_with_the_end() -> None:
    events = written(accepted("a", "END"), *said("a", "the EN"), step(ended=[("a", "length")]))
    assert [delta.text for delta in deltas(events, "a")] == ["t", "h", "e", " ", "", ""]
    assert finished(events, "a").text == "EN"
    assert finished(events, "a").reason == "length"


def test_a_character_comes_when_its_last_byte_is_there() -> None:
    events = written(accepted("a"), *said("a", "é"), step(token("a", 0xC3, "length")))
    assert [delta.text for delta in deltas(events, "a")] == ["", "é", ""]
    assert finished(events, "a").text == "\ufffd"


@pytest.mark.parametrize(("show", "shown"), [(False, "x"), (True, "<c>x")])
def test_control_tokens_are_shown_where_asked_and_the_end_never_is(show: bool, shown: str) -> None:
    sampled = [step(token("a", CONTROL)), step(token("a", ord("x"))), step(token("a", END, "stop"))]
    events = written(accepted("a", show_special=show), *sampled)
    assert text(events, "a") == shown
    assert [delta.tokens for delta in deltas(events, "a")] == [(CONTROL,), (ord("x"),), (END,)]
    assert finished(events, "a").usage.completion_tokens == 3


def test_a_replay_counts_what_was_delivered_and_goes_on_with_what_was_held_back() -> None:
    again = accepted("a", "END", delivered=b"the EN")
    cached = StepDone([("a", PROMPT + 3)], [])
    events = written(again, cached, *said("a", "D"))
    assert PrefillProgress(id="a", processed=0, total=PROMPT + len("the EN")) in events
    end = finished(events, "a")
    assert (end.reason, end.stop, end.text) == ("stop", "END", "")
    assert end.usage == Usage(prompt_tokens=PROMPT, completion_tokens=len("the END"), cached_tokens=PROMPT)


@pytest.mark.parametrize(
    ("delivered", "reason"), [([*b"an END"], "stop"), ([65, END], "stop"), ([65] * (LIMIT - PROMPT), "length")]
)
def test_a_replay_of_what_had_ended_ends_at_once(delivered: list[int], reason: str) -> None:
    events = written(accepted("a", "END", delivered=delivered))
    assert finished(events, "a").reason == reason
    assert finished(events, "a").usage.completion_tokens == len(delivered)
    assert deltas(events, "a") == []


def test_a_step_s_tokens_come_in_order_in_messages_of_bounded_size() -> None:
    names = [f"request-{number}" for number in range(2 * PART_DELTAS + 1)]
    events = written(*(accepted(name) for name in names), step(*(token(name, 65) for name in names)))
    messages = [event for event in events if isinstance(event, Deltas)]
    assert [len(message.items) for message in messages] == [PART_DELTAS, PART_DELTAS, 1]
    assert [delta.id for message in messages for delta in message.items] == names


def test_log_probabilities_have_the_bytes_of_control_tokens_and_are_numbers() -> None:
    scores = Scores(float("-inf"), [(CONTROL, -0.5), (65, float("-inf"))])
    events = written(accepted("a"), step(token("a", 66, "length", scores)))
    [delta] = deltas(events, "a")
    [found] = delta.logprobs
    assert (found.chosen.token, found.chosen.bytes, found.chosen.logprob) == (66, (66,), LEAST_LOGPROB)
    assert [(top.token, bytes(top.bytes), top.logprob) for top in found.top] == [
        (CONTROL, b"<c>", -0.5),
        (65, b"A", LEAST_LOGPROB),
    ]


def test_a_prompt_s_log_probabilities_come_in_parts_that_follow_each_other() -> None:
    prompt = [number % 256 for number in range(PART_LOGPROBS)]
    scores = [Scores(-1.0, [(65, -0.1)])] * (len(prompt) - 1)
    begin = PromptScored.following("a", prompt, 0, scores[:99])
    rest = PromptScored.following("a", prompt, 100, scores[99:])
    events = written(accepted("a"), StepDone([], [], prompts=[begin]), StepDone([], [], prompts=[rest]))
    parts = [event for event in events if isinstance(event, PromptLogprobs)]
    assert len(parts) > 2
    assert all(sum(1 + len(item.top) for item in part.items) <= PART_LOGPROBS for part in parts)
    assert all(part.start + len(part.items) == after.start for part, after in pairwise(parts))
    items = [item for part in parts for item in part.items]
    assert [item.chosen.token for item in items] == prompt
    assert [item.chosen.logprob for item in items] == [None, *[-1.0] * (len(prompt) - 1)]


def test_a_vector_ends_its_request() -> None:
    embedded = Embedded(id="a", vector=(0.5,), usage=Usage(prompt_tokens=PROMPT, completion_tokens=0))
    events = written(TextAccepted("a", PROMPT), embedded)
    assert events[1:] == [PrefillProgress(id="a", processed=0, total=PROMPT), embedded, Status(state="Ready")]


NAMES = ("a", "b", "c")
REASONS: st.SearchStrategy[FinishReason | None] = st.sampled_from([None, None, None, "length", "stop"])
SAMPLED = st.tuples(st.sampled_from(NAMES), st.sampled_from([*b"xyEND", END]), REASONS)
HAPPENINGS = st.one_of(
    st.lists(SAMPLED, max_size=3, unique_by=lambda each: each[0]).map(
        lambda drawn: step(*(token(*each) for each in drawn))
    ),
    st.sampled_from(NAMES).map(Cancelled),
    st.sampled_from(NAMES).map(lambda name: step(ended=[(name, "length")])),
    st.sampled_from(NAMES).map(lambda name: StepDone([(name, 1)], [(name, 3)])),
    st.sampled_from(NAMES).map(lambda name: StepDone([], [], prompts=[PromptScored(name, 0, [65], [None])])),
)


@given(st.lists(HAPPENINGS, max_size=30))
def test_every_request_has_one_terminal_event_and_nothing_after_it(happenings: list[Item]) -> None:
    last = [item for name in NAMES for item in (Cancelled(name), Cancelled(name))]
    events = written(*(accepted(name, "END", "EN") for name in NAMES), *happenings, *last)
    for name in NAMES:
        end = events.index(finished(events, name))
        for event in events[end + 1 :]:
            parts = event.items if isinstance(event, Deltas) else [event]
            assert not any(getattr(part, "id", None) == name for part in parts)
        assert finished(events, name).usage.completion_tokens == len(deltas(events, name))
    assert not any(isinstance(event, Failed) for event in events)
    assert [event.state for event in events if isinstance(event, Status)] == ["Running", "Ready"]
