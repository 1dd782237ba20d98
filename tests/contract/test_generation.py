"""Prompts, stop strings, replays, prefixes and several requests at once, on every runner."""

from itertools import islice

import pytest

from exo.worker.protocol.commands import Grammar, Sibling
from tests.contract.cases import CASES, constrained, goes_on_from_everywhere, long_prompt, one
from tests.support.program import Program, ask, names

name = names()


def test_a_request_is_accepted_answered_and_ended_once(program: Program) -> None:
    result = one(program, ask(next(name), max_tokens=12))
    assert result.prefill[0].processed == 0
    assert result.prefill[-1].processed == result.prefill[-1].total == result.finished.usage.prompt_tokens
    assert len(result.tokens) == result.finished.usage.completion_tokens == 12
    assert result.finished.reason == "length"
    assert result.text
    one(program, ask(next(name)))
    assert result.after_end == []


def test_text_and_token_ids_are_two_ways_to_give_one_prompt(program: Program) -> None:
    letters = "once upon a time"
    from_text = one(program, ask(next(name), letters))
    again = one(program, ask(next(name), letters))
    assert from_text.tokens == again.tokens
    ids = one(program, ask(next(name), long_prompt(9)))
    assert ids.finished.usage.prompt_tokens == 9


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generation_goes_on_from_the_tokens_delivered(program: Program, temperature: float) -> None:
    goes_on_from_everywhere(program, ask(next(name), long_prompt(7), max_tokens=20, temperature=temperature, seed=5))
    goes_on_from_everywhere(program, ask(next(name), "words", max_tokens=20, temperature=temperature, seed=6))


def test_a_stop_string_across_the_cut_is_found_and_what_was_held_back_is_not_lost(program: Program) -> None:
    free = one(program, ask(next(name), max_tokens=24))
    for start in (0, 7, 13):
        stop = free.text[start : start + 6]
        whole = goes_on_from_everywhere(program, ask(next(name), max_tokens=24, stop=[stop]))
        assert whole.finished.stop == stop
    never = [free.text[-3:] + "never", free.text[5:9] + "\x00"]
    assert goes_on_from_everywhere(program, ask(next(name), max_tokens=24, stop=never)).text == free.text


def test_a_context_that_the_delivered_tokens_fill_ends_by_length(program: Program) -> None:
    whole = goes_on_from_everywhere(program, ask(next(name), long_prompt(504), max_tokens=None))
    assert (whole.finished.reason, len(whole.tokens)) == ("length", 8)


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(program: Program) -> None:
    free = one(program, ask(next(name), max_tokens=24))
    for start in range(2, 12):
        stop = free.text[start : start + 4]
        stopped = one(program, ask(next(name), max_tokens=24, stop=[stop]))
        assert stopped.text == free.text[: free.text.index(stop)]
        assert (stopped.finished.reason, stopped.finished.stop) == ("stop", stop)
        assert len(stopped.tokens) == stopped.finished.usage.completion_tokens <= 24
        assert free.tokens[: len(stopped.tokens)] == stopped.tokens


@pytest.mark.parametrize(("before", "after"), [("", ""), ("x", ""), ("", "y"), ("x", "y")])
def test_a_stop_string_may_name_control_tokens(program: Program, before: str, after: str) -> None:
    assert program.capabilities is not None
    control = program.capabilities.special_tokens[0]
    grammar = Grammar(syntax="lark", source=f'start: "ax" {control} "yb"')
    stop = (before + control + after, "never" + control, control + "never")
    whole = goes_on_from_everywhere(program, constrained(grammar, stop=stop))
    assert (whole.text, whole.finished.reason, whole.finished.stop) == ("ax".removesuffix(before), "stop", stop[0])
    missed = goes_on_from_everywhere(program, constrained(grammar, stop=stop[1:]))
    assert (missed.text, missed.finished.stop) == ("axyb", None)


def test_text_held_back_for_a_stop_string_that_never_comes_is_not_lost(program: Program) -> None:
    free = one(program, ask(next(name), max_tokens=8))
    held = one(program, ask(next(name), max_tokens=8, stop=[free.text[-2:] + "never", free.text[3:5] + "\x00"]))
    assert held.text == free.text
    assert held.finished.reason == "length"


def test_a_full_context_ends_generation_by_length(program: Program) -> None:
    result = one(program, ask(next(name), long_prompt(500), max_tokens=None))
    assert (result.finished.reason, len(result.tokens)) == ("length", 12)


def test_more_requests_than_slots_all_finish(program: Program) -> None:
    results = program.generate(
        *(ask(each, f"story {index}", max_tokens=10 + index) for index, each in zip(range(25), name, strict=False))
    )
    assert [len(result.tokens) for result in results] == [10 + index for index in range(25)]


def test_a_late_request_joins_running_ones(slow_program: Program) -> None:
    program = slow_program
    early, late = islice(name, 2)
    program.send(ask(early, max_tokens=None))
    program.until(lambda: early in program.results and len(program.results[early].tokens) >= 3)
    assert one(program, ask(late, max_tokens=5)).finished.reason == "length"
    assert program.results[early].end is None
    program.cancel(early)
    program.until(program.ended(early))


def test_running_streams_go_on_while_a_long_prompt_is_computed_and_neither_leaves_a_trace(
    slow_program: Program,
) -> None:
    program = slow_program
    stream, prompt = ask(next(name), max_tokens=5000, temperature=1.0, seed=4), ask(next(name), long_prompt(1200))
    program.send(stream)
    program.until(lambda: stream.id in program.results and len(program.results[stream.id].tokens) >= 3)
    program.send(prompt)
    program.until(lambda: prompt.id in program.results)
    before = len(program.results[stream.id].tokens)
    program.until(lambda: bool(program.results[prompt.id].tokens))
    assert len(program.results[stream.id].tokens) - before > 20
    program.cancel(stream.id)
    program.until(program.ended(stream.id, prompt.id))
    for request in (stream, prompt):
        tokens = program.results[request.id].tokens
        alone = one(program, request.model_copy(update={"id": next(name), "max_tokens": len(tokens)}))
        assert alone.tokens == tokens


def test_sequences_of_one_prompt_come_together_and_end_each_for_itself(program: Program) -> None:
    first, *others = (ask(next(name), "once upon", max_tokens=20, temperature=1.0, seed=seed) for seed in range(4))
    expected = [result.tokens for result in program.generate(first, *others)]
    again = first.model_copy(update={"id": next(name)})
    also = tuple(Sibling(id=next(name), seed=seed) for seed in range(1, 4))
    program.send(again.model_copy(update={"also": also}))
    program.until(program.ended(again.id, *(each.id for each in also)))
    assert [program.results[each].tokens for each in (again.id, *(each.id for each in also))] == expected
    ids = [next(name) for _ in range(3)]
    siblings = tuple(Sibling(id=each, seed=1) for each in ids[1:])
    program.send(ask(ids[0], [-1]).model_copy(update={"also": siblings}))
    program.until(program.ended(*ids))
    assert [program.results[each].failed.param for each in ids] == ["prompt"] * 3


def test_a_prefix_computed_before_is_reused_without_a_trace_in_the_text(
    sampling_program: Program, request: pytest.FixtureRequest
) -> None:
    block = CASES[request.node.callspec.params["sampling_program"]].cache_block
    prompt = long_prompt(300)
    first = one(sampling_program, ask(next(name), prompt, max_tokens=20))
    again = one(sampling_program, ask(next(name), prompt, max_tokens=20))
    longer = one(sampling_program, ask(next(name), prompt + first.tokens[:10], max_tokens=10))
    assert again.tokens == first.tokens
    assert longer.tokens == first.tokens[10:]
    assert again.finished.usage.cached_tokens == 299 // block * block
    assert longer.finished.usage.cached_tokens >= 299 // block * block


def test_a_request_may_have_its_prompt_computed_although_it_is_cached(sampling_program: Program) -> None:
    prompt = long_prompt(200)
    first = one(sampling_program, ask(next(name), prompt))
    for _ in range(2):
        fresh = one(sampling_program, ask(next(name), prompt).model_copy(update={"cache_prompt": False}))
        assert fresh.tokens == first.tokens
        assert fresh.finished.usage.cached_tokens == 0


# --- log-probabilities ---
