"""The MLX runner's constrained output beyond the contract: among rows without a grammar, with every kind of sampling
parameters, and token for token as runner_cuda chooses on the same weights.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Generate, Grammar, SamplingParams
from tests.support.program import Program, Result, ask, names
from tests.support.twins import Models, Start

name = names()

SCHEMA: JsonValue = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["big", "small"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
JSON = Grammar(syntax="json_schema", source=json.dumps(SCHEMA))
DIGITS = Grammar(syntax="regex", source="[0-9]{3}-[0-9]{4,6}")
LIST = Grammar(syntax="lark", source='start: item ("," item)*\nitem: /[a-z]{1,5}/')

KINDS = [
    SamplingParams(seed=0, temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7, top_k=20, top_p=0.9),
    SamplingParams(seed=3, temperature=1.2, min_p=0.02, repetition_penalty=1.3),
    SamplingParams(seed=4, temperature=0, frequency_penalty=0.7, presence_penalty=0.2),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    starter = Start(Models(tmp_path_factory.mktemp("models")))
    yield starter
    starter.stop()


@pytest.fixture(scope="module")
def program(start: Start) -> Program:
    return start.mlx(start.models.mlx("llama"), slots=8)


def one(program: Program, request: Generate) -> Result:
    return program.generate(request)[0]


def constrained(grammar: Grammar | None, params: SamplingParams, prompt: str = "words") -> Generate:
    request = ask(next(name), prompt, max_tokens=40, ignore_eos=False)
    return request.model_copy(update={"grammar": grammar, "sampling": params})


def crowd() -> list[Generate]:
    """Each kind of sampling parameters with each grammar and with none, in all orders."""
    grammars = [JSON, None, DIGITS, None, LIST]
    return [
        constrained(grammar, params, f"prompt {'x' * index}")
        for index, (grammar, params) in enumerate((grammar, params) for params in KINDS for grammar in grammars)
    ]


def check(request: Generate, result: Result) -> None:
    """What is constrained and ended by itself matches as a whole."""
    if request.grammar is None or result.finished.reason == "length":
        return
    if request.grammar is JSON:
        found = json.loads(result.text)
        assert found.keys() == {"name", "kind"}
        assert found["kind"] in ("big", "small")
    else:
        assert re.fullmatch(
            "[0-9]{3}-[0-9]{4,6}" if request.grammar is DIGITS else "[a-z]{1,5}(,[a-z]{1,5})*", result.text
        )


def test_rows_with_a_grammar_and_rows_without_do_not_change_each_other(program: Program) -> None:
    alone = [one(program, request) for request in crowd()]
    requests = crowd()
    together = program.generate(*requests)
    for request, result, before in zip(requests, together, alone, strict=True):
        assert result.tokens == before.tokens, request
        check(request, result)
    matched = [result for request, result in zip(requests, together, strict=True) if request.grammar is DIGITS]
    assert all(result.finished.reason == "stop" for result in matched)


def test_a_row_with_a_grammar_joins_and_leaves_rows_that_run_without(program: Program) -> None:
    alone = [one(program, constrained(None, params)).tokens for params in KINDS]
    running = [constrained(None, params) for params in KINDS]
    program.send(*running)
    program.until(lambda: all(request.id in program.results for request in running))
    for _ in range(3):
        assert one(program, constrained(DIGITS, KINDS[1])).finished.reason == "stop"
    program.until(program.ended(*(request.id for request in running)))
    assert [program.results[request.id].tokens for request in running] == alone


def test_output_that_cannot_go_on_ends_at_once_even_if_no_end_may_be_chosen(program: Program) -> None:
    request = ask(next(name), ignore_eos=True).model_copy(update={"grammar": Grammar(syntax="regex", source="x{3}")})
    result = one(program, request)
    assert (result.text, result.tokens, result.finished.reason) == ("xxx", [120] * 3, "stop")
    assert result.finished.usage.completion_tokens == 3


def test_penalties_see_what_a_grammar_made_of_the_choice(program: Program) -> None:
    """Each digit costs so much that the ones used least come next; no two digits are one token."""
    grammar = Grammar(syntax="regex", source="[1357]{12}")
    for temperature in (0.0, 1.0):
        params = SamplingParams(seed=5, temperature=temperature, frequency_penalty=100)
        result = one(program, constrained(grammar, params))
        assert Counter(result.text) == dict.fromkeys("1357", 3)


def test_a_grammar_that_is_none_fails_its_request_alone(program: Program) -> None:
    running = constrained(JSON, KINDS[0])
    alone = one(program, running).tokens
    again, broken = running.model_copy(update={"id": next(name)}), constrained(None, KINDS[0])
    broken = broken.model_copy(update={"grammar": Grammar(syntax="regex", source="(")})
    results = program.generate(again, broken)
    assert (results[1].failed.code, results[1].failed.param) == ("invalid_request", "grammar")
    assert results[0].tokens == alone


def test_what_is_chosen_under_a_grammar_is_what_runner_cuda_chooses(start: Start, program: Program) -> None:
    requests = [request for request in crowd() if request.grammar is not None]
    mlx = program.generate(*requests)
    cuda = start.cuda(start.models.gguf("llama")).generate(*requests)
    assert [result.text for result in mlx] == [result.text for result in cuda]
    assert [result.finished.reason for result in mlx] == [result.finished.reason for result in cuda]
