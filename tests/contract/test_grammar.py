"""Constrained output: it matches its grammar, alone, among others, and continued on another runner."""

import json
import re
import signal

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Cancel, Grammar, SamplingParams
from tests.contract.cases import REGEX, Shared, Start, constrained, goes_on_from_everywhere, one, twins_choose
from tests.support.program import Program, ask, names

name = names()


SCHEMA = Grammar(
    syntax="json_schema",
    source=json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 8},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "tags": {"type": "array", "items": {"enum": ["old", "new"]}, "maxItems": 3},
            },
            "required": ["name", "age", "tags"],
            "additionalProperties": False,
        }
    ),
)


LARK = Grammar(
    syntax="lark", source='start: greeting " " NAME "!"\ngreeting: "hello" | "good day"\nNAME: /[A-Z][a-z]{1,9}/'
)


LONG = Grammar(syntax="json_schema", source=json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 40}))


def matches(grammar: Grammar, text: str) -> bool:
    if grammar is SCHEMA:
        person = json.loads(text)
        assert list(person) == ["name", "age", "tags"]
        return len(person["name"]) <= 8 and person["age"] in range(151) and {*person["tags"]} <= {"old", "new"}
    pattern = REGEX.source if grammar is REGEX else "(hello|good day) [A-Z][a-z]{1,9}!"
    return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_whole_output_matches_the_grammar(program: Program, temperature: float, ignore_eos: bool) -> None:
    grammars = [grammar for grammar in (SCHEMA, REGEX, LARK) for _ in range(3)]
    results = program.generate(
        *(
            constrained(grammar, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
            for seed, grammar in enumerate(grammars)
        )
    )
    for grammar, result in zip(grammars, results, strict=True):
        assert matches(grammar, result.text), result.text
        assert (result.finished.reason, result.finished.stop) == ("stop", None)
        assert result.finished.usage.completion_tokens == len(result.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_advanced_over_the_tokens_delivered(program: Program, temperature: float) -> None:
    for grammar in (SCHEMA, REGEX, LARK):
        goes_on_from_everywhere(program, constrained(grammar, temperature=temperature, seed=3))


def test_a_runner_killed_in_the_middle_of_json_leaves_what_another_completes(start: Start, shared: Shared) -> None:
    request = constrained(LONG, temperature=1.0, seed=11, max_tokens=4000)
    killed = start.slow(slots=1, n_ctx=8192)
    killed.send(request)
    killed.until(lambda: request.id in killed.results and len(killed.results[request.id].tokens) > 30)
    killed.process.kill()
    assert killed.drain() == -signal.SIGKILL
    before = killed.results[request.id]
    assert before.end is None
    other = shared.slow(start.case)
    (after,) = other.generate(request.model_copy(update={"delivered": tuple(before.tokens)}))
    (whole,) = other.generate(request.model_copy(update={"id": next(name)}))
    assert before.tokens + after.tokens == whole.tokens
    assert before.text + after.text == whole.text
    assert after.finished.reason == "stop"
    assert len(json.loads(whole.text)) >= 40


def test_a_constrained_request_gives_the_same_tokens_alone_and_among_others(sampling_program: Program) -> None:
    request = constrained(SCHEMA, temperature=1.0, seed=42)
    alone = one(sampling_program, request)
    crowd = [constrained(grammar, temperature=1.2, seed=seed) for seed, grammar in enumerate([LARK, REGEX, SCHEMA] * 4)]
    free = [ask(next(name), temperature=1.0, seed=seed, max_tokens=40) for seed in range(3)]
    results = sampling_program.generate(*crowd, request.model_copy(update={"id": next(name)}), *free)
    assert results[len(crowd)].tokens == alone.tokens
    assert alone.tokens != results[2].tokens


WAYS_TO_CHOOSE: list[dict[str, JsonValue]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "presence_penalty": 0.8, "frequency_penalty": -0.3},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 1.0, "logit_bias": {"101": 2.5, "32": -100.0}, "frequency_penalty": 0.5},
]


def test_twins_choose_alike(shared: Shared) -> None:
    """With every parameter and every kind of grammar, all in one batch."""
    ways = [SamplingParams.model_validate({"seed": seed, **way}) for seed, way in enumerate(WAYS_TO_CHOOSE)]
    free = [ask(next(name), max_tokens=60).model_copy(update={"sampling": way}) for way in ways]
    requests = free + [
        constrained(grammar, temperature=1.0, seed=seed) for seed in range(4) for grammar in (SCHEMA, REGEX, LARK)
    ]
    tokens = twins_choose(shared, requests)
    assert all(each == tokens[0] for each in tokens)


def test_a_stop_string_or_max_tokens_may_cut_constrained_output(program: Program) -> None:
    grammar = Grammar(syntax="regex", source="a{30}")
    cut = one(program, constrained(grammar, max_tokens=3))
    assert (cut.finished.reason, len(cut.tokens)) == ("length", 3)
    stopped = one(program, constrained(grammar, stop=("aaa",)))
    assert (stopped.finished.reason, stopped.finished.stop, stopped.text) == ("stop", "aaa", "")


def test_where_only_an_end_is_left_the_output_ends_even_if_ends_are_ignored(program: Program) -> None:
    assert program.capabilities is not None
    end = program.capabilities.eos_token
    for ignore_eos, tokens in ((True, 2), (False, 3)):
        grammar = Grammar(syntax="lark", source=f'start: "a" "b" {end}?')
        result = one(program, constrained(grammar, ignore_eos=ignore_eos))
        assert (result.text, result.finished.reason) == ("ab", "stop")
        assert len(result.tokens) <= tokens
        nothing = one(program, constrained(Grammar(syntax="lark", source='start: ""'), ignore_eos=ignore_eos))
        assert (nothing.text, nothing.finished.reason) == ("", "stop")


def test_an_end_is_allowed_where_the_output_may_end_and_nowhere_else(sampling_program: Program) -> None:
    assert sampling_program.capabilities is not None
    vocabulary = sampling_program.capabilities.vocabulary
    bias = dict.fromkeys(range(vocabulary - 3, vocabulary), 1000.0)
    sampling = SamplingParams(seed=0, temperature=0, logit_bias=bias)
    request = constrained(Grammar(syntax="regex", source="[ab]{5}[cd]*"), ignore_eos=False, sampling=sampling)
    result = one(sampling_program, request)
    assert re.fullmatch("[ab]{5}", result.text)
    assert result.finished.reason == "stop"
    assert result.tokens[-1] >= vocabulary - 3


def test_control_tokens_are_reached_by_reference_and_never_by_their_text(program: Program) -> None:
    assert program.capabilities is not None
    text, token = program.capabilities.special_tokens[0], program.capabilities.special_ids[0]
    spelt = one(program, constrained(Grammar(syntax="lark", source=f'start: "x{text}y"'), show_special=True))
    assert spelt.text == f"x{text}y"
    assert token not in spelt.tokens
    for reference in (text, f"<[{token}]>"):
        grammar = Grammar(syntax="lark", source=f'start: "x" {reference} "y"')
        meant = one(program, constrained(grammar))
        assert (meant.text, token in meant.tokens) == ("xy", True)
        shown = goes_on_from_everywhere(program, constrained(grammar, show_special=True))
        assert (shown.text, shown.tokens) == (f"x{text}y", meant.tokens)
        stopped = one(program, constrained(grammar, show_special=True, stop=(text[1:3],)))
        assert (stopped.text, stopped.finished.stop) == (f"x{text[0]}", text[1:3])


BAD_GRAMMARS = {
    "no JSON": Grammar(syntax="json_schema", source="{"),
    "no schema": Grammar(syntax="json_schema", source="[1]"),
    "a type that does not exist": Grammar(syntax="json_schema", source='{"type": "number of things"}'),
    "nothing matches": Grammar(syntax="json_schema", source='{"$ref": "#"}'),
    "nested deeply": Grammar(syntax="json_schema", source='{"items":' * 20_000 + "{}" + "}" * 20_000),
    "an open bracket": Grammar(syntax="regex", source="[a-"),
    "an unknown rule": Grammar(syntax="lark", source="start: nowhere"),
    "no such token": Grammar(syntax="lark", source="start: <|nonsense|>"),
    "for ever": Grammar(
        syntax="lark",
        source="start: A\nA: " + " & ".join(f"/(.*\\n)*[a-z]*x{{{count}}}[^b]*/" for count in range(1, 30)),
    ),
}


def test_a_bad_grammar_fails_its_own_request_only(slow_program: Program) -> None:
    program = slow_program
    good = next(name)
    program.send(ask(good, max_tokens=None))
    bad = program.generate(*(constrained(grammar) for grammar in BAD_GRAMMARS.values()))
    for what, result in zip(BAD_GRAMMARS, bad, strict=True):
        assert (result.failed.code, result.failed.param) == ("invalid_request", "grammar"), what
        assert result.failed.message.startswith("grammar: "), what
        assert (result.prefill, result.after_end) == ([], []), what
    program.cancel(good)
    program.until(program.ended(good))
    assert program.results[good].finished.reason in ("cancelled", "length")
    assert matches(REGEX, one(program, constrained(REGEX)).text)


def test_a_constrained_request_can_be_cancelled_at_once(program: Program) -> None:
    """Whether its grammar is being compiled or it generates already."""
    requests = [constrained(LONG, max_tokens=None) for _ in range(3)]
    for request in requests:
        program.send(request, Cancel(id=request.id))
    program.until(program.ended(*(request.id for request in requests)))
    for request in requests:
        assert program.results[request.id].finished.reason == "cancelled"
        assert program.results[request.id].after_end == []
