"""The MLX sampler against the definition in ``messages.SamplingParams``, written out plainly over the whole vocabulary.

The sampler computes in float32, so where the definition's answer hangs on the sixth digit, either answer will do.
"""

from collections.abc import Sequence as Rows
from typing import cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.keyed_rng import BLOCK
from exo.worker.runner_mlx.sampling.sampler import FAILED, MlxSampler
from exo.worker.runner_mlx.sequence import MlxSequence
from tests.support.definition import by_definition

Row = NDArray[np.float32]

SLACK = 1e-5
SIZES = st.sampled_from([5, 300, BLOCK, BLOCK + 1, 9000, 70_000])
PARAMS = st.builds(
    SamplingParams,
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 40, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)


def logits(size: int, seed: int, spread: float = 3.0) -> Row:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def sequence(
    params: SamplingParams, *, prompt: Rows[int] = (0,), output: Rows[int] = (), ends: tuple[int, ...] = ()
) -> MlxSequence:
    return MlxSequence("any", [*prompt, *output], len(prompt), 10**6, params, ends, ends_at=50)


def choose(
    sequences: Rows[MlxSequence], rows: Rows[Row], position: int = 0, unread: Rows[int] | None = None
) -> list[int]:
    """One token for each sequence."""
    known = None if unread is None else mx.array(list(unread))
    sampler = MlxSampler(sequences, rows[0].size, known)
    return cast(list[int], sampler.choose(mx.array(np.stack(rows)), [position] * len(rows)).tolist())


def nearly_by_definition(row: Row, params: SamplingParams, position: int) -> set[int]:
    """Every answer that the definition gives within the slack of its parameters and of the logits."""
    return {
        token
        for top_p in {params.top_p * factor for factor in (1 - SLACK, 1, min(1 + SLACK, 1 / params.top_p))}
        for min_p in {params.min_p * factor for factor in (1 - SLACK, 1)}
        for token in by_definition(
            row, params.model_copy(update={"top_p": top_p, "min_p": min_p}), position, slack=5 * SLACK
        )
    }


@settings(max_examples=150)
@given(SIZES, st.integers(0, 10**6), st.lists(PARAMS, min_size=1, max_size=6))
def test_every_choice_is_the_defined_one_whatever_else_is_in_the_batch(
    size: int, seed: int, params: list[SamplingParams]
) -> None:
    rows = [logits(size, seed + index) for index in range(len(params))]
    sampler = MlxSampler([sequence(each) for each in params], size)
    for position in range(4):
        chosen = cast(list[int], sampler.choose(mx.array(np.stack(rows)), [position] * len(rows)).tolist())
        for token, row, each in zip(chosen, rows, params, strict=True):
            assert {token} == by_definition(row, each, position) or token in nearly_by_definition(row, each, position)


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.2, 0.5, 0.9]), st.sampled_from([0, 2, 5]))
def test_equals_at_the_borders_of_top_k_and_top_p_are_kept_as_defined(
    seed: int, levels: int, top_p: float, top_k: int
) -> None:
    """Few different logits, so that nearly every border runs through equal ones."""
    row = (np.random.default_rng(seed).integers(0, levels, 300) / 2).astype(np.float32)
    params = SamplingParams(seed=seed, top_p=top_p, top_k=top_k)
    for position in range(4):
        [token] = choose([sequence(params)], [row], position)
        assert {token} == by_definition(row, params, position) or token in nearly_by_definition(row, params, position)


@settings(max_examples=60)
@given(
    SIZES,
    st.integers(0, 10**6),
    st.lists(st.tuples(PARAMS, st.sampled_from([1, 2, 7, 60, None])), min_size=1, max_size=6),
)
def test_what_a_grammar_leaves_out_is_as_if_it_had_no_probability(
    size: int, seed: int, asked: list[tuple[SamplingParams, int | None]]
) -> None:
    """Each row has parameters and how many tokens its grammar allows; None: it has no grammar."""
    random = np.random.default_rng(seed)
    rows = [logits(size, seed + index) for index in range(len(asked))]
    allowed = np.ones((len(asked), size), np.uint8)
    for row, (_, n_allowed) in zip(allowed, asked, strict=True):
        if n_allowed is not None:
            row[random.permutation(size)[n_allowed:]] = 0
    masked = [np.where(mask, row, -np.inf).astype(np.float32) for mask, row in zip(allowed, rows, strict=True)]
    sampler = MlxSampler([sequence(params) for params, _ in asked], size)
    chosen = sampler.choose(mx.array(np.stack(rows)), [3] * len(rows), mx.array(allowed).astype(mx.bool_))
    for token, row, (params, _) in zip(cast(list[int], chosen.tolist()), masked, asked, strict=True):
        assert {token} == by_definition(row, params, 3) or token in nearly_by_definition(row, params, 3)


def test_neither_bias_nor_penalties_bring_back_what_a_grammar_leaves_out() -> None:
    biased = sequence(SamplingParams(seed=0, logit_bias={2: 10_000.0}))
    rewarded = sequence(
        SamplingParams(seed=0, temperature=0, presence_penalty=-50, repetition_penalty=0.01), output=[2]
    )
    allowed = mx.array([[True, True, False, False], [False, True, False, True]])
    sampler = MlxSampler([biased, rewarded], 4)
    row = mx.array([[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 5.0, 1.0]])
    chosen = [cast(list[int], sampler.choose(row, [at, at], allowed).tolist()) for at in range(30)]
    assert {first for first, _ in chosen} == {0, 1}
    assert {second for _, second in chosen} == {3}


def test_frequencies_follow_the_probabilities() -> None:
    shares = {3: 0.5, 40: 0.3, 700: 0.15, 701: 0.05}
    row = np.full(3 * BLOCK, -np.inf, np.float32)
    row[list(shares)] = np.log(list(shares.values()))
    sampler = MlxSampler([sequence(SamplingParams(seed=seed)) for seed in range(200)], row.size)
    logits = mx.array(np.stack([row] * 200))
    drawn = [cast(list[int], sampler.choose(logits, [position] * 200).tolist()) for position in range(100)]
    counts = np.bincount(np.array(drawn).ravel(), minlength=702)
    assert all(abs(counts[token] / 20_000 - share) < 0.01 for token, share in shares.items())


def test_a_large_vocabulary_s_faint_tokens_are_not_lost_in_rounding() -> None:
    """One has half the probability, 250,000 share the rest: 2e-6 each, which float32 adds to a half 1 % off."""
    size = 250_001
    row = np.full(size, np.log(0.5 / (size - 1)), np.float32)
    row[0] = np.log(0.5)
    params = SamplingParams(seed=1)
    sampler = MlxSampler([sequence(params)], size)
    for position in range(100):
        [token] = cast(list[int], sampler.choose(mx.array(row[None]), [position]).tolist())
        assert token in by_definition(row, params, position, slack=5 * SLACK)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    row = np.zeros(2000, np.float32)
    row[[700, 1500]] = 4
    assert choose([sequence(SamplingParams(seed=0, temperature=0))], [row]) == [700]


def test_repetition_penalty_counts_prompt_and_output_and_pulls_both_signs_down() -> None:
    rows = [np.array(values, np.float32) for values in ([2.0, 1.9, -1.0], [2.0, 1.9, -1.0], [-9, -1.0, -1.05])]
    params = SamplingParams(seed=0, temperature=0, repetition_penalty=1.2)
    sequences = [
        sequence(params, prompt=[0]),
        sequence(params, prompt=[0], output=[1]),
        sequence(params, prompt=[0], output=[1]),
    ]
    assert choose(sequences, rows) == [1, 0, 2]


def test_repetition_penalty_counts_the_last_tokens_of_its_window() -> None:
    params = SamplingParams(seed=0, temperature=0, repetition_penalty=2, repetition_window=2)
    row = np.array([3.0, 2.9, 2.8, 2.7], np.float32)
    one = sequence(params, prompt=[0, 1, 2, 2])
    sampler = MlxSampler([one, sequence(params, prompt=[1, 0, 1])], 4, mx.array([FAILED, 0]))
    # The tokens before each choice: 2 2, 2 0, 0 1, 1 2 and 1 0, 0 2, 2 1, 1 0.
    chosen = [cast(list[int], sampler.choose(mx.array(np.stack([row, row])), [at, at]).tolist()) for at in range(4, 8)]
    assert chosen == [[0, 2], [1, 1], [2, 0], [0, 2]]


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    params = SamplingParams(seed=0, temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    one = sequence(params, prompt=[0, 0, 0], output=[1, 1, 2])
    # Tokens 1 and 2 lose 0.5 + 2 * 0.25 and 0.5 + 0.25, the others nothing.
    assert choose([one], [np.array([0.10, 1.04, 0.80, 0.0], np.float32)]) == [0]
    assert choose([one], [np.array([0.02, 1.06, 0.80, 0.0], np.float32)]) == [1]
    assert choose([one], [np.array([0.02, 1.04, 0.80, 0.0], np.float32)]) == [2]


def test_penalties_count_tokens_that_only_the_device_knows_and_those_just_chosen() -> None:
    params = SamplingParams(seed=0, temperature=0, presence_penalty=1.0)
    row = np.array([3.0, 2.9, 2.8, 2.7], np.float32)
    sampler = MlxSampler([sequence(params), sequence(params, output=[0])], 4, mx.array([0, FAILED]))
    chosen = [cast(list[int], sampler.choose(mx.array(np.stack([row, row])), [9, 9]).tolist()) for _ in range(3)]
    assert chosen == [[1, 1], [2, 2], [3, 3]]


def test_logit_bias_forces_and_forbids() -> None:
    row = logits(1000, 1)
    best = int(row.argmax())
    forced = sequence(SamplingParams(seed=0, logit_bias={17: 100.0}))
    banned = sequence(SamplingParams(seed=0, temperature=0, logit_bias={best: -100.0}))
    for position in range(20):
        first, second = choose([forced, banned], [row, row], position)
        assert first == 17
        assert second != best


def test_tokens_that_end_are_not_chosen_before_their_time_even_if_biased() -> None:
    params = SamplingParams(seed=0, logit_bias={3: 1000.0})
    one = sequence(params, ends=(0, 1, 2, 3, 4, 5, 6))
    assert {choose([one], [np.zeros(8, np.float32)], position)[0] for position in range(50)} == {7}
    assert {choose([one], [np.zeros(8, np.float32)], position)[0] for position in range(50, 60)} == {3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail_their_row_only(temperature: float, value: float) -> None:
    bad, good = logits(1000, 1), logits(1000, 2)
    bad[5] = value
    params = SamplingParams(seed=0, temperature=temperature)
    chosen = choose([sequence(params), sequence(params)], [bad, good])
    assert chosen[0] == FAILED
    assert {chosen[1]} == by_definition(good, params, 0)


def test_a_temperature_too_small_for_float32_is_nearly_greedy() -> None:
    row = logits(1000, 1)
    assert choose([sequence(SamplingParams(seed=0, temperature=1e-60))], [row]) == [int(row.argmax())]
