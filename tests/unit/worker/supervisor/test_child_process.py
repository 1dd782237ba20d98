"""The lines of a child's output: split reads, bounds, and lines that are not events."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo.worker.protocol.events import Event, Heartbeat, Status
from exo.worker.protocol.messages import LINE_BYTES
from exo.worker.protocol.wire import ProtocolError, encode
from exo.worker.supervisor.child_process import EventLines

EVENTS = [Status(state="Idle"), Status(state="Loading"), Heartbeat(steps=1, active=0, waiting=0)]
STREAM = b"".join(map(encode, EVENTS))


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_do_not_depend_on_how_reads_split_them(cuts: list[int]) -> None:
    lines, found = EventLines(), list[Event]()
    places = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(places):
        lines.feed(STREAM[start:end], found.append)
    assert found == EVENTS


def test_an_unfinished_line_is_no_event() -> None:
    lines, found = EventLines(), list[Event]()
    lines.feed(STREAM[:-1], found.append)
    assert found == EVENTS[:-1]


def test_a_line_that_is_no_event_names_its_request_and_follows_the_events_before_it() -> None:
    lines, found = EventLines(), list[Event]()
    with pytest.raises(ProtocolError, match="it wrote b") as caught:
        lines.feed(STREAM + b'{"type":"deltas","id":"mine"}\n', found.append)
    assert caught.value.request == "mine"
    assert found == EVENTS


def test_a_line_is_bounded_before_it_ends() -> None:
    lines, found = EventLines(), list[Event]()
    lines.feed(b'{"type":"tokenized","id":"mine",' + b" " * (LINE_BYTES - 32), found.append)
    with pytest.raises(ProtocolError, match=f"a line of more than {LINE_BYTES} bytes") as caught:
        lines.feed(b" ", found.append)
    assert caught.value.request == "mine"
    assert found == []


def test_an_error_of_the_listener_is_raised_to_the_reader() -> None:
    def fail(_: Event) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        EventLines().feed(STREAM, fail)
