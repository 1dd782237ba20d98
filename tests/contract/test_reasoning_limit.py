"""A limit of the reasoning: the runner closes it there, and everything else is as without a limit."""

import pytest

from exo.chat.output.registry import output_format
from exo.worker.protocol.commands import Generate, ReasoningLimit, SamplingParams
from tests.contract.cases import REGEX, Shared, goes_on_from_everywhere, one, twins_choose
from tests.contract.test_grammar import WAYS_TO_CHOOSE
from tests.support.program import Program, Result, ask, names

name = names()

CLOSING = "\n</think>\n\n"
"""Most runners' models here have no token for the marker, so it takes several."""


def thinking(most: int, *, inside: bool = True, max_tokens: int = 60, **updates: object) -> Generate:
    """A request that no twin's own choice ends, nor its reasoning."""
    limit = ReasoningLimit(max_tokens=most, begin="<think>", end="</think>", closing=CLOSING, inside=inside)
    request = ask(next(name), max_tokens=max_tokens)
    sampling = request.sampling.model_copy(
        update={key: updates.pop(key) for key in ("temperature", "seed") & updates.keys()}
    )
    return request.model_copy(update={"reasoning": limit, "ignore_eos": True, "sampling": sampling, **updates})


def after(result: Result, tokens: int) -> str:
    """The text after the first tokens, whose last character may be incomplete."""
    return "".join(result.pieces[tokens:]).lstrip("\ufffd")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("most", [0, 1, 25])
def test_reasoning_is_closed_at_its_limit_and_unchanged_before_it(
    program: Program, most: int, temperature: float
) -> None:
    limited = thinking(most, temperature=temperature, seed=5)
    bounded, free = program.generate(limited, limited.model_copy(update={"id": next(name), "reasoning": None}))
    assert "</think>" not in free.text
    assert bounded.tokens[:most] == free.tokens[:most]
    assert after(bounded, most).startswith(CLOSING)
    assert bounded.text.count("</think>") == 1
    assert bounded.finished.usage.completion_tokens == len(bounded.tokens) == 60
    assert bounded.finished.reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_replayed_request_counts_the_reasoning_delivered(program: Program, temperature: float) -> None:
    whole = goes_on_from_everywhere(program, thinking(12, temperature=temperature, seed=3, max_tokens=30))
    assert whole.text.count("</think>") == 1


def test_reasoning_that_the_reply_begins_itself_is_limited_too(program: Program) -> None:
    opened = thinking(4, inside=False, delivered=tuple(b"\n<think>"))
    assert after(one(program, opened), 4).startswith(CLOSING)
    for answer in (b"Use <think>", b"<thin air", b"<think></think>no"):
        told = thinking(4, inside=False, delivered=tuple(answer), max_tokens=80)
        assert "</think>" not in one(program, told).text


def test_reasoning_that_the_model_ends_is_not_ended_again(program: Program) -> None:
    assert "</think>" not in one(program, thinking(8, delivered=tuple(b"Well.</think>"))).text
    begun = one(program, thinking(4, delivered=tuple(b"Well</")))
    assert after(begun, 1).startswith(CLOSING)  # the token between may be the rest of its own marker


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_of_the_content_holds_after_reasoning_was_closed(program: Program, temperature: float) -> None:
    form = output_format("{# <think></think> #}")
    grammar = form.after_reasoning(REGEX, special_tokens={})
    request = thinking(15, temperature=temperature, seed=9, grammar=grammar, max_tokens=200)
    whole = goes_on_from_everywhere(program, request)
    reasoning, content = whole.text.split("</think>")
    assert len(reasoning) >= 15
    assert whole.finished.reason == "stop"
    assert content.startswith(("\n\nyes, ", "\n\nno, "))


def test_a_closing_that_the_grammar_excludes_is_left_out(program: Program) -> None:
    result = one(program, thinking(3, grammar=REGEX, max_tokens=200))
    assert result.text.startswith(("yes, ", "no, "))
    assert result.finished.reason == "stop"


def test_limits_do_not_depend_on_company(sampling_program: Program) -> None:
    requests = [thinking(most, temperature=1.0, seed=most) for most in range(0, 24, 3)]
    alone = [one(sampling_program, each.model_copy(update={"id": next(name)})).tokens for each in requests]
    free = [ask(next(name), temperature=1.0, seed=seed, max_tokens=40) for seed in range(3)]
    together = sampling_program.generate(*requests, *free)
    assert [result.tokens for result in together[: len(requests)]] == alone


def test_twins_close_alike(shared: Shared) -> None:
    ways = [SamplingParams.model_validate({"seed": seed, **way}) for seed, way in enumerate(WAYS_TO_CHOOSE)]
    requests = [thinking(10 + at, sampling=way) for at, way in enumerate(ways)]
    tokens = twins_choose(shared, requests)
    assert all(each == tokens[0] for each in tokens)
