"""How tokens are chosen: seeds, greedy decoding, bias, penalties, and ends of generation."""

from itertools import islice

from exo.worker.protocol.events import Capabilities
from tests.contract.cases import goes_on_from_everywhere, one
from tests.support.program import Program, ask, names

name = names()


def test_a_seeded_request_gives_the_same_tokens_alone_and_among_fifteen_others(sampling_program: Program) -> None:
    prompt = "the quick brown fox"
    alone = one(sampling_program, ask(next(name), prompt, temperature=1.0, seed=42, max_tokens=48))
    others = [
        ask(each, f"{index} other words", temperature=1.3, seed=index, max_tokens=20 + 3 * index)
        for index, each in zip(range(15), name, strict=False)
    ]
    crowd = sampling_program.generate(
        *others[:7], ask(next(name), prompt, temperature=1.0, seed=42, max_tokens=48), *others[7:]
    )
    assert crowd[7].tokens == alone.tokens
    different = one(sampling_program, ask(next(name), prompt, temperature=1.0, seed=43, max_tokens=48))
    assert different.tokens != alone.tokens


def test_greedy_is_the_same_in_every_slot(sampling_program: Program) -> None:
    results = sampling_program.generate(*(ask(each, "same words", max_tokens=32) for each in islice(name, 16)))
    assert len({tuple(result.tokens) for result in results}) == 1


def test_logit_bias_forces_a_token(sampling_program: Program) -> None:
    result = one(sampling_program, ask(next(name), temperature=1.0, logit_bias={120: 1000.0}, max_tokens=6))
    assert result.tokens == [120] * 6


def test_penalties_change_what_is_chosen(sampling_program: Program) -> None:
    plain = one(sampling_program, ask(next(name), max_tokens=60))
    varied = sampling_program.generate(
        ask(next(name), max_tokens=60, frequency_penalty=2.0),
        ask(next(name), max_tokens=60, presence_penalty=2.0),
        ask(next(name), max_tokens=60, repetition_penalty=1.8),
    )
    assert all(len(set(result.tokens)) > len(set(plain.tokens)) for result in varied)


def test_a_repetition_penalty_may_count_the_last_tokens_only(sampling_program: Program) -> None:
    every, whole, last = sampling_program.generate(
        *(ask(next(name), max_tokens=60, repetition_penalty=1.8, repetition_window=size) for size in (0, 500, 3))
    )
    assert whole.tokens == every.tokens
    assert len(set(last.tokens)) < len(set(every.tokens))
    goes_on_from_everywhere(
        sampling_program, ask(next(name), max_tokens=20, repetition_penalty=1.8, repetition_window=3)
    )


def test_penalties_count_the_tokens_delivered(sampling_program: Program) -> None:
    for temperature in (0.0, 1.0):
        request = ask(
            next(name),
            seed=3,
            temperature=temperature,
            max_tokens=30,
            repetition_penalty=1.3,
            presence_penalty=0.7,
            frequency_penalty=0.4,
        )
        goes_on_from_everywhere(sampling_program, request)


def test_a_character_that_is_cut_in_two_is_whole_in_the_end(sampling_program: Program) -> None:
    """Only x and bytes of é, € and 😀 may be drawn, so that characters are whole, broken and cut at random."""
    bias = dict.fromkeys("é€😀x".encode(), 10_000.0)
    whole = goes_on_from_everywhere(
        sampling_program, ask(next(name), max_tokens=60, temperature=50.0, seed=1, logit_bias=bias, stop=["x\ufffdxxx"])
    )
    assert not whole.text.isascii()
    assert whole.finished.usage.completion_tokens > 5


def test_an_end_of_generation_token_delivered_ends_the_request(sampling_program: Program) -> None:
    capabilities = sampling_program.capabilities
    assert isinstance(capabilities, Capabilities)
    ends = range(capabilities.vocabulary - 3, capabilities.vocabulary)
    bias = dict.fromkeys((*range(97, 120), *ends), 10_000.0)
    request = ask(next(name), temperature=50.0, seed=8, logit_bias=bias, ignore_eos=False, max_tokens=100)
    assert goes_on_from_everywhere(sampling_program, request).finished.reason == "stop"


def test_an_end_of_generation_token_ends_by_stop_and_can_be_ignored(sampling_program: Program) -> None:
    capabilities = sampling_program.capabilities
    assert isinstance(capabilities, Capabilities)
    end = capabilities.vocabulary - 1
    bias = {end - 2: 1000.0, end - 1: 1000.0, end: 1000.0}
    ended = one(sampling_program, ask(next(name), logit_bias=bias, ignore_eos=False))
    assert (ended.finished.reason, ended.text, len(ended.tokens)) == ("stop", "", 1)
    assert ended.finished.usage.completion_tokens == 1
    ignored = one(sampling_program, ask(next(name), logit_bias=bias, ignore_eos=True, max_tokens=5))
    assert ignored.finished.reason == "length"
    assert ended.tokens[0] not in ignored.tokens


def test_nothing_ends_the_first_tokens(sampling_program: Program) -> None:
    capabilities = sampling_program.capabilities
    assert isinstance(capabilities, Capabilities)
    ends = range(capabilities.vocabulary - 3, capabilities.vocabulary)
    bias = {**dict.fromkeys(b"ab", 5_000.0), **dict.fromkeys(ends, 10_000.0)}
    request = ask(next(name), seed=3, temperature=50.0, logit_bias=bias, ignore_eos=False, max_tokens=40)
    for least in (1, 7):
        longer = request.model_copy(update={"id": next(name), "min_tokens": least})
        result = goes_on_from_everywhere(sampling_program, longer)
        assert result.finished.reason == "stop"
        assert set(result.tokens[:least]) <= {*b"ab", *ends}  # not every special token ends generation
        assert set(result.tokens[least:]) <= {*ends}
        assert len(result.tokens) > least


def test_a_stop_string_is_looked_for_in_the_text_after_the_first_tokens(sampling_program: Program) -> None:
    request = ask(next(name), logit_bias={ord("a"): 10_000.0}, stop=["aa"], max_tokens=40)
    assert one(sampling_program, request).text == ""
    longer = request.model_copy(update={"id": next(name), "min_tokens": 7})
    result = goes_on_from_everywhere(sampling_program, longer)
    assert (result.text, result.finished.reason, result.finished.stop) == ("a" * 7, "stop", "aa")
    assert len(result.tokens) == 9


def test_more_first_tokens_than_tokens_are_refused(sampling_program: Program) -> None:
    request = ask(next(name), max_tokens=4).model_copy(update={"min_tokens": 5})
    failed = one(sampling_program, request).failed
    assert (failed.code, failed.param) == ("invalid_request", "min_tokens")


def test_a_stop_token_ends_the_output_and_is_no_part_of_its_text(sampling_program: Program) -> None:
    plain = one(sampling_program, ask(next(name), seed=5, temperature=2.0, max_tokens=30))
    at = next(at for at, token in enumerate(plain.tokens) if at > 2 and token not in plain.tokens[:at])
    request = ask(next(name), seed=5, temperature=2.0, max_tokens=30)
    request = request.model_copy(update={"stop_tokens": (plain.tokens[at], 0)})
    result = goes_on_from_everywhere(sampling_program, request)
    assert result.tokens == plain.tokens[: at + 1]
    assert (result.finished.reason, result.finished.stop) == ("stop", None)
    longer = request.model_copy(update={"id": next(name), "min_tokens": at + 1})
    assert one(sampling_program, longer).tokens[: at + 2] == plain.tokens[: at + 2]


def test_the_text_may_end_with_what_ended_it(sampling_program: Program) -> None:
    biased = ask(next(name), logit_bias={ord("a"): 10_000.0}, max_tokens=40)
    for update, text in (({"stop": ("aaa",)}, "aaa"), ({"stop_tokens": (ord("a"),)}, "a")):
        request = biased.model_copy(update={"id": next(name), **update})
        assert one(sampling_program, request).text == ""
        shown = request.model_copy(update={"id": next(name), "show_stop": True})
        result = goes_on_from_everywhere(sampling_program, shown)
        assert (result.text, result.finished.reason) == (text, "stop")


def test_only_allowed_tokens_are_chosen(sampling_program: Program) -> None:
    for temperature in (0.0, 5.0):
        request = ask(next(name), seed=2, temperature=temperature, max_tokens=40, allowed=(*b"xyz",))
        result = goes_on_from_everywhere(sampling_program, request)
        assert set(result.tokens) <= {*b"xyz"}
        assert len(result.tokens) == 40
    biased = ask(next(name), allowed=(*b"xyz",), logit_bias={ord("y"): 100.0, ord("a"): 100.0}, max_tokens=5)
    assert one(sampling_program, biased).text == "yyyyy"
    assert one(sampling_program, ask(next(name), allowed=(10**6,))).failed.param == "allowed"
