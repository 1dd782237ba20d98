"""The sampler against the definition in ``messages.SamplingParams``, written out plainly over the whole vocabulary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.keyed_rng import BLOCK
from exo.worker.runner_cuda.sampling.candidates import Mask, NotFinite, Row
from exo.worker.runner_cuda.sampling.sampler import Sampler, Turn, choose, score
from tests.support.definition import by_definition

SIZES = st.sampled_from([5, 300, BLOCK, 3 * BLOCK + 7, 9000])


def logits(size: int, seed: int, spread: float = 3.0) -> Row:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


@settings(max_examples=100)
@given(
    SIZES,
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 2, 40, 200]),
    st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    st.sampled_from([0.0, 0.05, 1.0]),
)
def test_every_choice_is_the_defined_one(
    size: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row = logits(size, seed)
    sampler = Sampler(params)
    for position in range(8):
        assert {sampler.choose(row.copy(), position)} == by_definition(row, params, position)


PARAMS = st.builds(
    SamplingParams,
    seed=st.sampled_from([0, 7, 2**64 - 1]),
    temperature=st.sampled_from([0.0, 1e-40, 0.3, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 41, 300, 100_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    logit_bias=st.sampled_from([{}, {3: 5.0}]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
)


@st.composite
def rows_of_a_step(draw: st.DrawFn) -> list[tuple[SamplingParams, Row, int, Mask | None]]:
    """Rows with ties, with tokens left out (at times all but the last ones) and with logits that are no numbers."""
    size = draw(SIZES)
    step: list[tuple[SamplingParams, Row, int, Mask | None]] = []
    for _ in range(draw(st.integers(1, 6))):
        row = logits(size, draw(st.integers(0, 10**6))).round(draw(st.integers(0, 3))) - draw(st.sampled_from([0, 50]))
        if draw(st.booleans()):
            row[draw(st.integers(0, size - 1)) :: 3] = -np.inf
        row[draw(st.integers(0, size - 1))] = draw(st.sampled_from([0.0, 0.0, 0.0, np.nan, np.inf]))
        mask = draw(st.sampled_from([None, np.arange(size) % 7 == 1, np.arange(size) >= size - 2]))
        step.append((draw(PARAMS), row, draw(st.integers(0, 3)), mask))
    return step


@settings(max_examples=100)
@given(rows_of_a_step())
def test_a_row_gets_the_same_token_in_any_company(step: list[tuple[SamplingParams, Row, int, Mask | None]]) -> None:
    turns: list[Turn] = []
    alone: list[int | None] = []
    for params, row, position, mask in step:
        sampler = Sampler(params)
        sampler.accept(4)
        turns.append(Turn(sampler, row.copy(), position, mask))
        sampler.adjust(turns[-1].row, position)
        left = turns[-1].row if mask is None else np.where(mask, turns[-1].row, -np.inf).astype(np.float32)
        finite = bool(np.isfinite(left.max()))
        try:
            alone.append(sampler.choose(row.copy(), position, mask))
        except NotFinite:
            assert not finite
            alone.append(None)
        else:
            assert finite
            assert {alone[-1]} == by_definition(left, params, position)
    assert choose(turns) == alone


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 70_003])
def test_long_rows_chosen_from_together_get_the_tokens_that_each_gets_alone(size: int) -> None:
    rows = [logits(size, seed) for seed in range(12)]
    rows[1][:] = 2.5
    rows[2] = rows[2].round()
    rows[3][:-3] = -np.inf
    rows[4][size - 1] = np.nan
    rows[5][0] = np.inf
    rows[6][:] = -np.inf
    rows[7] -= 100
    rows[8][::2] = 0.0
    rows[8][1::2] = -0.0
    rows[9][[0, 1, size - 2, size - 1]] = 40
    for top_k in (1, 3, 40, 1000, size - 1):
        mixed = [top_k, top_k, top_k, top_k, top_k, top_k, top_k, top_k, top_k, top_k, 7, 0]
        samplers = [Sampler(SamplingParams(seed=9, top_k=k, top_p=0.9)) for k in mixed]
        alone: list[int | None] = []
        for sampler, row in zip(samplers, rows, strict=True):
            alone += choose([Turn(sampler, row.copy(), 5)])
            if np.isfinite(row.max()):
                assert {alone[-1]} == by_definition(row, sampler.params, 5)
        turns = [Turn(sampler, row.copy(), 5) for sampler, row in zip(samplers, rows, strict=True)]
        assert choose(turns) == alone
        assert choose(turns[::-1]) == alone[::-1]
        assert [at for at, token in enumerate(alone) if token is None] == [4, 5, 6]


@pytest.mark.parametrize("top_k", [0, 4])
def test_frequencies_follow_the_probabilities(top_k: int) -> None:
    shares = {3: 0.5, 40: 0.3, 700: 0.15, 701: 0.05}
    row = np.full(4 * BLOCK, -np.inf, np.float32)
    row[list(shares)] = np.log(list(shares.values()))
    sampler = Sampler(SamplingParams(seed=3, top_k=top_k))
    counts = np.bincount([sampler.choose(row.copy(), position) for position in range(5000)], minlength=702)
    assert all(abs(counts[token] / 5000 - share) < 0.015 for token, share in shares.items())


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    row = np.zeros(2000, np.float32)
    row[[700, 1500]] = 4
    assert Sampler(SamplingParams(seed=0, temperature=0)).choose(row, 0) == 700


def test_top_k_keeps_equals_of_the_last_one() -> None:
    row = np.full(5000, -10, np.float32)
    row[[10, 2000, 4000]] = 1
    chosen = {Sampler(SamplingParams(seed=seed, top_k=2)).choose(row.copy(), 0) for seed in range(200)}
    assert chosen == {10, 2000, 4000}


def test_repetition_penalty_counts_prompt_and_output_and_pulls_both_signs_down() -> None:
    row = np.array([2.0, 1.9, -1.0, -1.05], np.float32)
    sampler = Sampler(SamplingParams(seed=0, temperature=0, repetition_penalty=1.2))
    sampler.accept_prompt([0])
    assert sampler.choose(row.copy(), 1) == 1
    sampler.accept(1)
    assert sampler.choose(row.copy(), 2) == 0
    adjusted = row.copy()
    sampler.accept(2)
    sampler.choose(adjusted, 3)
    np.testing.assert_allclose(adjusted, [2.0 / 1.2, 1.9 / 1.2, -1.0 * 1.2, -1.05], rtol=1e-6)


def test_repetition_penalty_counts_the_last_tokens_of_its_window() -> None:
    sampler = Sampler(SamplingParams(seed=0, temperature=0, repetition_penalty=2, repetition_window=2))
    sampler.accept_prompt([0, 1, 1])
    rows: list[Row] = []
    for token in (2, 2, 3, 0):
        rows.append(np.full(4, 2, np.float32))
        sampler.adjust(rows[-1], 0)
        sampler.accept(token)
    assert np.stack(rows).tolist() == [[2, 1, 2, 2], [2, 1, 1, 2], [2, 2, 1, 2], [2, 2, 1, 1]]


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    sampler = Sampler(SamplingParams(seed=0, temperature=0, presence_penalty=0.5, frequency_penalty=0.25))
    sampler.accept_prompt([0, 0, 0])
    for token in (1, 1, 2):
        sampler.accept(token)
    row = np.zeros(4, np.float32)
    sampler.choose(row, 6)
    assert row.tolist() == [0.0, -1.0, -0.75, 0.0]


def test_logit_bias_forces_and_forbids() -> None:
    row = logits(1000, 1)
    best = int(row.argmax())
    forced = Sampler(SamplingParams(seed=0, logit_bias={17: 100.0}))
    assert {forced.choose(row.copy(), position) for position in range(50)} == {17}
    banned = Sampler(SamplingParams(seed=0, temperature=0, logit_bias={best: -100.0}))
    assert banned.choose(row.copy(), 0) != best


def test_tokens_that_end_are_not_chosen_before_their_time() -> None:
    row = np.zeros(8, np.float32)
    sampler = Sampler(SamplingParams(seed=0), ends=[0, 1, 2, 3, 4, 5, 6], ends_at=50)
    assert {sampler.choose(row.copy(), position) for position in range(50)} == {7}
    assert {sampler.choose(row.copy(), position) for position in range(50, 100)} > {7}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 2, 5])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.5])
def test_what_a_grammar_leaves_out_is_left_out_before_all_else(temperature: float, top_k: int, share: float) -> None:
    params = SamplingParams(seed=4, temperature=temperature, top_k=top_k, top_p=0.9)
    for seed in range(20):
        row = logits(3 * BLOCK + 7, seed)
        allowed = np.random.default_rng(seed + 100).random(row.size) < share
        allowed[seed] = True
        left = np.where(allowed, row, -np.inf).astype(np.float32)
        assert {Sampler(params).choose(row.copy(), seed, allowed)} == by_definition(left, params, seed)


def test_bias_and_penalties_do_not_bring_back_what_a_grammar_leaves_out() -> None:
    params = SamplingParams(seed=0, temperature=0, logit_bias={5: 1000.0, 6: 10.0}, frequency_penalty=-100)
    sampler = Sampler(params)
    sampler.accept(5)
    allowed = np.arange(100) % 2 == 0
    assert sampler.choose(logits(100, 1), 0, allowed) == 6


@settings(max_examples=100)
@given(SIZES, st.integers(0, 10**6), st.integers(0, 20), st.sampled_from([0.01, 3.0, 300.0]))
def test_scores_are_the_logarithm_of_the_softmax(size: int, seed: int, n_top: int, spread: float) -> None:
    row = logits(size, seed, spread).round(2)
    exact = row.astype(np.float64) - row.max()
    exact -= np.log(np.exp(exact).sum())
    order = sorted(range(size), key=lambda token: (-row[token], token))[:n_top]
    token = seed % size
    before = row.copy()
    found = score(row, token, n_top)
    assert np.array_equal(row, before)
    assert [each for each, _ in found.top] == order
    np.testing.assert_allclose([value for _, value in found.top], exact[order], atol=1e-5)
    np.testing.assert_allclose(found.chosen, exact[token], atol=1e-4)


def test_scores_of_logits_that_are_no_numbers_are_reported() -> None:
    row = logits(1000, 1)
    row[5] = np.nan
    with pytest.raises(NotFinite):
        score(row, 0, 3)


def test_a_token_without_a_chance_has_a_score_but_is_not_among_the_best() -> None:
    found = score(np.array([1.0, -np.inf, 2.0], np.float32), 1, 3)
    assert found.chosen == -np.inf
    assert [token for token, _ in found.top] == [2, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_reported(temperature: float) -> None:
    row = logits(1000, 1)
    row[5] = np.nan
    with pytest.raises(NotFinite):
        Sampler(SamplingParams(seed=0, temperature=temperature)).choose(row, 0)
