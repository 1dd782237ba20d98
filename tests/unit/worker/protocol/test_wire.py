import io

import pytest
from pydantic import ValidationError

from exo.worker.protocol.commands import Cancel, Generate, SamplingParams, Sibling
from exo.worker.protocol.events import Delta, Deltas, Failed, Heartbeat
from exo.worker.protocol.messages import LINE_BYTES
from exo.worker.protocol.wire import decode_event, encode, read_commands
from tests.support.program import ask


def test_messages_survive_the_wire_one_a_line() -> None:
    event = Deltas(items=(Delta(id="a", tokens=(1, 2), text="line\nbreak é😀\u2028"),))
    line = encode(event)
    assert line.count(b"\n") == 1
    assert decode_event(line) == event


def test_unknown_fields_and_types_are_refused() -> None:
    with pytest.raises(ValidationError):
        decode_event(b'{"type":"heartbeat","steps":1,"active":0,"waiting":0,"more":1}')
    with pytest.raises(ValidationError):
        decode_event(b'{"type":"something"}')


def test_a_bad_command_fails_the_request_it_names_and_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    lines = b'{"type":"generate","id":"x","prompt":[1],"sampling":{"temperature":-1,"seed":0}}\nrubbish\n' + encode(
        Cancel(id="y")
    )
    first, second = read_commands(io.BytesIO(lines))
    assert isinstance(first, Failed)
    assert (first.id, first.code) == ("x", "invalid_request")
    assert "temperature" in first.message
    assert "-1" in first.message
    assert second == Cancel(id="y")
    assert "not a command" in capfd.readouterr().err


def test_a_request_for_several_sequences_is_one_for_each_with_one_prompt_between_them() -> None:
    request = ask("a", "words", seed=5).model_copy(update={"also": (Sibling(id="b", seed=6), Sibling(id="c", seed=7))})
    found = list(read_commands(io.BytesIO(encode(request))))
    assert found == [ask("a", "words", seed=5), ask("b", "words", seed=6), ask("c", "words", seed=7)]
    prompts = [each.prompt for each in found if isinstance(each, Generate)]
    assert all(prompt is prompts[0] for prompt in prompts)


def test_a_line_that_is_too_long_is_skipped_and_the_next_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    begin = b'{"type":"generate","id":"%b","prompt":[{"text":"'
    too_long = begin % b"x" + b"a" * LINE_BYTES + b'"}]}\n'
    nameless = b'["' + b"a" * LINE_BYTES + b'"]\n'
    first, second = read_commands(io.BytesIO(too_long + nameless + encode(Cancel(id="y"))))
    assert isinstance(first, Failed)
    assert (first.id, first.code) == ("x", "invalid_request")
    assert second == Cancel(id="y")
    assert str(LINE_BYTES) in capfd.readouterr().err


def test_a_message_that_quotes_a_request_is_cut() -> None:
    assert len(Failed(id="a", code="invalid_request", message="x" * 10**6).message) <= 4000


def test_no_number_that_json_cannot_carry_gets_in() -> None:
    with pytest.raises(ValidationError):
        SamplingParams(seed=1, temperature=float("nan"))
    with pytest.raises(ValidationError):
        SamplingParams(seed=1, top_p=float("inf"))


def test_messages_cannot_be_changed() -> None:
    beat = Heartbeat(steps=1, active=0, waiting=0)
    with pytest.raises(ValidationError):
        beat.steps = 2  # pyright: ignore[reportAttributeAccessIssue]
