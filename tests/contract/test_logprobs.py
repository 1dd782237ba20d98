"""Log-probabilities of output and prompt."""

import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from exo.worker.protocol.messages import MAX_PROMPT_LOGPROBS, PART_LOGPROBS
from exo.worker.protocol.score import Score
from tests.contract.cases import CASES, REGEX, SAMPLING, Shared, Start, constrained, long_prompt, one
from tests.support.program import Program, ask, names

name = names()


def test_logprobs_are_those_of_the_model_alone(program: Program) -> None:
    plain = ask(next(name), max_tokens=24).model_copy(update={"logprobs": 5, "show_special": True})
    result = one(program, plain)
    assert len(result.logprobs) == len(result.tokens)
    assert [each.chosen.token for each in result.logprobs] == result.tokens
    assert b"".join(bytes(each.chosen.bytes) for each in result.logprobs).decode(errors="replace") == result.text
    for each in result.logprobs:
        known = [top.logprob for top in each.top if top.logprob is not None]
        assert len(known) == 5
        assert known == sorted(known, reverse=True)
        assert sum(map(math.exp, known)) <= 1 + 1e-6
        assert each.top[0] == each.chosen
    assert all(each.prompt_logprobs == [] for each in (result, one(program, ask(next(name)))))
    changed = constrained(REGEX, temperature=1.7, seed=1, logprobs=5)
    first, plain_first = (each.logprobs[0].top for each in (one(program, changed), result))
    assert [each.token for each in first] == [each.token for each in plain_first]
    # Where requests share a pool of cells, a sum depends on the place of a request's cells.
    assert [each.logprob for each in first] == pytest.approx([each.logprob for each in plain_first], abs=1e-5)


def test_logprobs_of_all_tokens_sum_up_to_one(sampling_program: Program) -> None:
    found: dict[int, float] = {}
    for token in range(320):
        request = ask(next(name), max_tokens=1, ignore_eos=False, logit_bias={token: 1e6})
        (place,) = one(sampling_program, request.model_copy(update={"logprobs": 0})).logprobs
        assert place.chosen.logprob is not None
        assert place.top == ()
        found[place.chosen.token] = place.chosen.logprob
    assert len(found) == 320
    assert abs(sum(map(math.exp, found.values())) - 1) < 1e-4


def test_no_logprobs_are_told_unasked(program: Program) -> None:
    result = one(program, ask(next(name)))
    assert (result.logprobs, result.prompt_logprobs) == ([], [])


def test_prompt_logprobs_are_what_generating_the_prompt_would_tell(program: Program) -> None:
    prompt = long_prompt(90)
    first = one(program, ask(next(name), prompt, max_tokens=20).model_copy(update={"logprobs": 3}))
    request = ask(next(name), prompt + first.tokens, max_tokens=4).model_copy(update={"prompt_logprobs": 3})
    for result in program.generate(request, request.model_copy(update={"id": next(name)})):
        (told,) = result.prompt_logprobs
        assert [item.chosen.token for item in told.items] == prompt + first.tokens
        assert (told.items[0].chosen.logprob, told.items[0].top) == (None, ())
        assert all(item.chosen.logprob is not None and len(item.top) == 3 for item in told.items[1:])
        for mine, theirs in zip(told.items[90:], first.logprobs, strict=True):
            assert mine.chosen.bytes == theirs.chosen.bytes
            assert abs((mine.chosen.logprob or 0) - (theirs.chosen.logprob or 0)) < 1e-3
        assert result.finished.usage.cached_tokens == 0


def test_the_logprobs_of_a_long_prompt_come_in_parts(program: Program) -> None:
    request = ask(next(name), long_prompt(400), max_tokens=2).model_copy(update={"prompt_logprobs": 20})
    result = one(program, request)
    assert len(result.prompt_logprobs[0].items) == 400
    assert result.parts >= 400 * 21 / PART_LOGPROBS
    assert len(result.tokens) == 2
    (alone,) = one(
        program, ask(next(name), [97], max_tokens=0).model_copy(update={"prompt_logprobs": 3})
    ).prompt_logprobs
    assert [item.chosen.logprob for item in alone.items] == [None]


def test_more_logprobs_of_a_prompt_than_can_be_told_are_refused(program: Program) -> None:
    most = MAX_PROMPT_LOGPROBS // 21
    request = ask(next(name), [97] * (most + 1)).model_copy(update={"prompt_logprobs": 20})
    refused = one(program, request).failed
    assert (refused.code, refused.param) == ("invalid_request", "prompt_logprobs")
    assert str(most) in refused.message


@pytest.mark.parametrize("kind", SAMPLING)
def test_prompt_logprobs_are_those_of_teacher_forcing(kind: str, shared: Shared, tmp_path: Path) -> None:
    case, prompt = CASES[kind], long_prompt(150)
    load = Start(case, shared.folder, []).load_command(n_ctx=512)
    command = Score(load=load, prompts=(tuple(prompt),), directory=str(tmp_path))
    subprocess.run(
        [*case.command, "--score"], input=command.model_dump_json().encode(), stdout=subprocess.DEVNULL, check=True
    )
    expected = np.load(tmp_path / "0.npy")
    request = ask(next(name), prompt, max_tokens=0).model_copy(update={"prompt_logprobs": 20})
    (told,) = one(shared.program(case), request).prompt_logprobs
    for row, item in zip(expected, told.items[1:], strict=False):
        known = {each.token: each.logprob for each in (item.chosen, *item.top)}
        assert all(abs(row[token] - (logprob or 0)) < 1e-3 for token, logprob in known.items())
        assert item.top[0].token == row.argmax()


def test_a_request_for_no_tokens_has_its_prompt_computed(program: Program) -> None:
    request = ask(next(name), long_prompt(120), max_tokens=0).model_copy(update={"prompt_logprobs": 0})
    result = one(program, request)
    assert (result.finished.reason, result.tokens, result.text) == ("length", [], "")
    assert result.finished.usage.prompt_tokens == result.prefill[-1].processed == 120
    assert result.finished.usage.completion_tokens == 0
    assert len(result.prompt_logprobs[0].items) == 120
    assert one(program, ask(next(name), long_prompt(120), max_tokens=0)).prompt_logprobs == []
