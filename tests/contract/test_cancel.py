"""Requests that are cancelled while they wait, in a prompt, or between two tokens."""

from itertools import islice

import pytest

from exo.worker.protocol.commands import Cancel, Sibling, Text, Tokenize
from tests.contract.cases import SAMPLING, long_prompt, one
from tests.support.program import Program, ask, names

name = names()


def test_cancel_frees_the_slot_and_is_idempotent(slow_program: Program) -> None:
    program = slow_program
    running, other, waiting, after = islice(name, 4)
    program.send(*(ask(each, max_tokens=None) for each in (running, other, waiting)))
    program.until(lambda: running in program.results and len(program.results[running].tokens) >= 2)
    program.cancel("nobody knows this one")
    program.cancel(waiting)
    program.until(program.ended(waiting))
    assert program.results[waiting].tokens == []
    program.cancel(running)
    program.cancel(running)
    program.until(program.ended(running))
    for request in (running, waiting):
        assert program.results[request].finished.reason == "cancelled"
    assert len(program.results[running].tokens) == program.results[running].finished.usage.completion_tokens
    assert one(program, ask(after)).finished.reason == "length"
    assert program.results[running].after_end == program.results[waiting].after_end == []
    assert program.results[other].end is None
    program.cancel(other)
    program.until(program.ended(other))


def test_cancel_takes_effect_in_the_middle_of_a_prompt(slow_program: Program) -> None:
    program = slow_program
    request = next(name)
    program.send(ask(request, long_prompt(8000)))
    program.until(lambda: request in program.results and program.results[request].prefill[-1].processed > 0)
    program.cancel(request)
    program.until(program.ended(request))
    result = program.results[request]
    assert result.finished.reason == "cancelled"
    assert result.prefill[-1].processed < 8000
    assert result.tokens == []


def test_one_of_several_sequences_of_a_prompt_is_cancelled_alone(slow_program: Program) -> None:
    program = slow_program
    request, sibling = ask(next(name), max_tokens=200), next(name)
    program.send(request.model_copy(update={"also": (Sibling(id=sibling, seed=0),)}), Cancel(id=sibling))
    program.until(program.ended(request.id, sibling))
    assert program.results[sibling].finished.reason == "cancelled"
    assert len(program.results[request.id].tokens) == 200


@pytest.mark.parametrize("slow_program", SAMPLING, indirect=True)
def test_a_cancel_waits_for_no_text_that_is_being_tokenized(slow_program: Program) -> None:
    """The stream has ended before the last of many long texts is tokenized."""
    program = slow_program
    stream, texts = next(name), [next(name) for _ in range(8)]
    program.send(ask(stream, max_tokens=None))
    program.until(lambda: stream in program.results and len(program.results[stream].tokens) > 0)
    text = "".join(chr(97 + at * at % 23) for at in range(400_000))
    program.send(*(Tokenize(id=each, prompt=(Text(text=text),)) for each in texts), Cancel(id=stream))
    program.until(program.ended(stream))
    assert program.results[stream].finished.reason == "cancelled"
    assert not program.ended(*texts)()
    program.until(program.ended(*texts))
