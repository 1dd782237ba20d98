"""The MLX runner's log-probabilities: against the same written out plainly in float64, and against ``--score``."""

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Generate, Grammar, SamplingParams
from exo.worker.protocol.events import TokenLogprobs
from exo.worker.protocol.runners import RUNNERS
from exo.worker.protocol.score import Score
from exo.worker.runner_mlx.sampling.logprobs import SUM_BLOCK, score
from tests.support.program import Program, Result, ask, names, runner_command
from tests.support.tiny import Shape, write_mlx
from tests.support.twins import mlx_load

COMMAND = runner_command(RUNNERS["mlx"].module)

name = names()

SIZES = st.sampled_from([3, 300, SUM_BLOCK, SUM_BLOCK + 1, 9000])


def plainly(row: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def check(rows: NDArray[np.float32], tokens: list[int], k: int) -> None:
    found = score(mx.array(rows), mx.array(tokens), k).read()
    for scores, row, token in zip(found, rows, tokens, strict=True):
        expected = plainly(row)
        order = np.argsort(-row, kind="stable")[:k]
        assert [number for number, _ in scores.top] == order.tolist()
        np.testing.assert_allclose(
            [scores.chosen, *(value for _, value in scores.top)], expected[[token, *order]], atol=3e-5
        )


@settings(max_examples=100)
@given(SIZES, st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 20), st.booleans())
def test_each_row_has_its_token_and_the_most_probable_in_order(
    size: int, seed: int, n_rows: int, k: int, coarse: bool
) -> None:
    """``coarse`` logits have few different values, of both signs and zero, so that equals are everywhere."""
    random = np.random.default_rng(seed)
    rows = random.normal(0, 3, (n_rows, size))
    rows = (np.round(rows / 2) * 2 if coarse else rows).astype(np.float32)
    check(rows, random.integers(0, size, n_rows).tolist(), k)


def test_zero_is_equal_to_minus_zero() -> None:
    check(np.array([[-0.0, 0.0, -1.0, -0.0, 0.0]], np.float32), [2], 5)


def test_a_large_vocabulary_s_faint_tokens_are_not_lost_in_rounding() -> None:
    """One has half the probability, 250,000 share the rest: 2e-6 each, which float32 adds to a half 1 % off."""
    row = np.full(250_001, np.log(0.5 / 250_000), np.float32)
    row[0] = np.log(0.5)
    check(row[None], [7], 3)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_logits_of_a_narrow_type_are_reckoned_with_in_float32(dtype: mx.Dtype) -> None:
    narrow = mx.random.normal((2, 5000), key=mx.random.key(1)).astype(dtype)
    wide = np.array(narrow.astype(mx.float32), np.float32)
    [scores, _] = score(narrow, mx.array([3, 4]), 2).read()
    assert scores.chosen == pytest.approx(plainly(wide[0])[3], abs=1e-5)


# --- in the runner ---


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("tiny")
    write_mlx(folder, Shape())
    with Program(COMMAND) as program:
        program.load(mlx_load(folder, slots=1))
        yield program


def told(name: str, length: int, params: SamplingParams, **asked: object) -> Generate:
    prompt = np.random.default_rng(length).integers(33, 127, length).tolist()
    return ask(name, prompt, max_tokens=12).model_copy(update={"sampling": params, **asked})


def compare(items: Sequence[TokenLogprobs], tokens: Sequence[int], rows: NDArray[np.float32], k: int) -> None:
    """``rows``, shape (tokens, vocabulary), are what ``--score`` found in these tokens' places."""
    assert [item.chosen.token for item in items] == list(tokens)
    for item, token, row in zip(items, tokens, rows, strict=True):
        assert item.chosen.logprob == pytest.approx(row[token], abs=1e-4)
        assert len(item.top) == k
        best = np.sort(row)[::-1][:k]
        np.testing.assert_allclose(np.array([each.logprob for each in item.top], np.float64), best, atol=1e-4)
        np.testing.assert_allclose(row[[each.token for each in item.top]], best, atol=1e-4)


def test_they_are_those_of_teacher_forcing_whatever_the_request_asks_for_and_whoever_else_is_there(
    tmp_path: Path,
) -> None:
    """Prompts of less than a chunk and of several; a penalty, a bias and a grammar, which must not show in them."""
    write_mlx(tmp_path / "model", Shape("gemma3"))
    load = mlx_load(tmp_path / "model", slots=6, prefill_chunk=32)
    digits = Grammar(syntax="regex", source="[0-9]{12}")
    greedy, seeded = SamplingParams(seed=0, temperature=0), SamplingParams(seed=4, logit_bias={100: 8.0})
    penalised = SamplingParams(seed=9, repetition_penalty=1.5, frequency_penalty=1)
    requests = [
        told(next(name), 3, greedy, logprobs=0, prompt_logprobs=5),
        told(next(name), 70, seeded, logprobs=20),
        told(next(name), 33, penalised, logprobs=3, prompt_logprobs=0),
        told(next(name), 100, seeded, logprobs=2, prompt_logprobs=20, grammar=digits),
        told(next(name), 50, greedy),
        told(next(name), 1, greedy, logprobs=1, prompt_logprobs=1),
        told(next(name), 100, seeded, prompt_logprobs=2, max_tokens=0),
    ]
    with Program(COMMAND) as program:
        program.load(load)
        results = program.generate(*requests)
    prompts = tuple(tuple(token for token in request.prompt if isinstance(token, int)) for request in requests)
    texts = tuple((*prompt, *result.tokens) for prompt, result in zip(prompts, results, strict=True))
    scored = Score(load=load, prompts=texts, directory=str(tmp_path))
    subprocess.run([*COMMAND, "--score"], input=scored.model_dump_json().encode(), stdout=subprocess.PIPE, check=True)
    for index, (request, result) in enumerate(zip(requests, results, strict=True)):
        rows: NDArray[np.float32] = np.load(tmp_path / f"{index}.npy")[:-1]
        prompt = prompts[index]
        assert len(result.tokens) == request.max_tokens
        if request.logprobs is None:
            assert result.logprobs == []
        else:
            compare(result.logprobs, result.tokens, rows[len(prompt) - 1 :], request.logprobs)
        if request.prompt_logprobs is None:
            assert result.prompt_logprobs == []
            continue
        [told_of_prompt] = result.prompt_logprobs
        first, *rest = told_of_prompt.items
        assert (first.chosen.token, first.chosen.logprob, first.top) == (prompt[0], None, ())
        compare(rest, prompt[1:], rows[: len(prompt) - 1], request.prompt_logprobs)


def test_cells_computed_before_are_computed_again_for_a_prompt_s_and_are_of_use_to_others(program: Program) -> None:
    greedy = SamplingParams(seed=0, temperature=0)
    first, again, plain = (
        program.generate(told(next(name), 80, greedy, prompt_logprobs=asked))[0] for asked in (1, 1, None)
    )
    assert [result.finished.usage.cached_tokens for result in (first, again, plain)] == [0, 0, 79]
    assert first.tokens == again.tokens == plain.tokens
    assert [each.items for each in first.prompt_logprobs] == [each.items for each in again.prompt_logprobs]


def test_a_prompt_s_come_before_the_first_token(program: Program) -> None:
    request = told(next(name), 80, SamplingParams(seed=0), prompt_logprobs=0)
    program.send(request)
    result = program.results.setdefault(request.id, Result())
    program.until(lambda: bool(result.prompt_logprobs or result.tokens))
    assert result.tokens == []
    program.until(program.ended(request.id))
    assert len(result.prompt_logprobs) == 1


@pytest.mark.parametrize("at", [5, 69], ids=["in the prompt", "at its end"])
def test_a_prompt_whose_logits_are_no_numbers_fails_alone(tmp_path: Path, at: int) -> None:
    write_mlx(tmp_path, Shape())
    weights = dict(load_file(tmp_path / "model.safetensors"))
    weights["model.embed_tokens.weight"][200] = np.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    params = SamplingParams(seed=0)
    spoilt = told(next(name), 70, params, logprobs=1, prompt_logprobs=1)
    prompt = [200 if index == at else 97 for index in range(70)]
    spoilt = spoilt.model_copy(update={"prompt": tuple(prompt)})
    with Program(COMMAND) as program:
        program.load(mlx_load(tmp_path))
        failing, other = program.generate(spoilt, told(next(name), 70, params, logprobs=1, prompt_logprobs=1))
    assert failing.failed.code == "engine_error"
    assert len(other.logprobs) == 12
