"""The measures of ``exo compare`` against numbers worked out by hand."""

from collections.abc import Sequence
from math import inf, log
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from exo.compare.comparison import CompareError
from exo.compare.divergence import (
    Row,
    compare_rows,
    greedy_margin,
    measure,
    negative_log_likelihood,
    row_after,
    seeded_margin,
)
from exo.compare.scoring import Scoring
from exo.worker.protocol.commands import SamplingParams
from exo.worker.protocol.events import Capabilities
from exo.worker.runner_common.keyed_rng import BLOCK, gumbels
from tests.support.definition import by_definition


def row(*probabilities: float) -> Row:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, np.float64))


def scoring(folder: Path, tokens: Sequence[tuple[int, ...]], *texts: Sequence[Row], vocabulary: int = 3) -> Scoring:
    """As if an engine had read ``tokens`` and written the rows of ``texts``."""
    folder.mkdir()
    files = tuple(folder / f"{index}.npy" for index in range(len(texts)))
    for file, rows in zip(files, texts, strict=True):
        np.save(file, np.stack(rows).astype(np.float32))
    can = Capabilities(engine="", engine_version="", backend="", context_length=1, slots=1, vocabulary=vocabulary)
    return Scoring(folder.name, tuple(tokens), files, can, {})


def test_of_two_distributions() -> None:
    found = compare_rows(row(1 / 2, 1 / 4, 1 / 4), row(1 / 4, 1 / 2, 1 / 4))
    assert found.max_abs == pytest.approx(log(2))
    assert found.mean_abs == pytest.approx(2 / 3 * log(2))
    assert found.kl == pytest.approx(log(2) / 4)
    assert not found.same_top


def test_kl_is_of_the_reference_against_the_other() -> None:
    one, two = row(1 / 2, 1 / 2), row(9 / 10, 1 / 10)
    assert compare_rows(one, two).kl == pytest.approx(log(25 / 9) / 2)
    assert compare_rows(two, one).kl == pytest.approx(0.9 * log(9 / 5) + 0.1 * log(1 / 5))


def test_of_a_distribution_and_itself() -> None:
    found = compare_rows(row(0.7, 0.2, 0.1), row(0.7, 0.2, 0.1))
    assert (found.max_abs, found.mean_abs, found.kl, found.same_top) == (0, 0, 0, True)


def test_a_token_that_both_rule_out_is_no_difference_and_one_that_only_the_other_does_is_infinite() -> None:
    both = compare_rows(row(0.75, 0.25, 0), row(0.25, 0.75, 0))
    assert both.max_abs == pytest.approx(log(3))
    assert both.kl == pytest.approx(log(3) / 2)
    other = compare_rows(row(0.5, 0.5, 0), row(1, 0, 0))
    assert (other.max_abs, other.kl) == (inf, inf)
    reference = compare_rows(row(1, 0, 0), row(0.5, 0.5, 0))
    assert reference.max_abs == inf
    assert reference.kl == pytest.approx(log(2))


def test_a_small_kl_survives_the_rounding_of_the_files() -> None:
    """Summing P log(P/Q) alone gives what the rounding to float32 left over, which is a hundred times as large."""
    random = np.random.default_rng(0)
    logits = random.normal(scale=3, size=50_000)
    exact = [_log_softmax(logits), _log_softmax(logits + random.normal(scale=1e-5, size=logits.size))]
    true = float(np.dot(np.exp(exact[0]), exact[0] - exact[1]))
    rounded = [each.astype(np.float32).astype(np.float64) for each in exact]
    assert compare_rows(*rounded).kl == pytest.approx(true, rel=0.05)
    assert abs(float(np.dot(np.exp(rounded[0]), rounded[0] - rounded[1])) - true) > 10 * true


def _log_softmax(logits: npt.NDArray[np.float64]) -> Row:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_over_texts_of_different_lengths(tmp_path: Path) -> None:
    even, left, right = row(1 / 4, 1 / 4, 1 / 2), row(1 / 2, 1 / 4, 1 / 4), row(1 / 4, 1 / 2, 1 / 4)
    tokens = [(0, 2), (1,)]
    found = measure(
        scoring(tmp_path / "one", tokens, [even, left], [left]),
        scoring(tmp_path / "two", tokens, [even, right], [right]),
    )
    assert (found.positions, found.vocabulary) == (3, 3)
    assert found.max_abs == pytest.approx(log(2), rel=1e-6)
    assert found.mean_abs == pytest.approx(4 / 9 * log(2), rel=1e-6)
    assert found.kl_mean == pytest.approx(log(2) / 6, rel=1e-6)
    assert found.kl_max == pytest.approx(log(2) / 4, rel=1e-6)
    assert found.top1_agreement == pytest.approx(1 / 3)
    assert [(each.position, each.sequences) for each in found.by_position] == [(0, 2), (1, 1)]
    assert [each.kl for each in found.by_position] == pytest.approx([log(2) / 8, log(2) / 4], rel=1e-6)
    assert [each.mean_abs for each in found.by_position] == pytest.approx([log(2) / 3, log(2) * 2 / 3], rel=1e-6)


def test_the_likelihood_is_of_each_token_after_those_before_it(tmp_path: Path) -> None:
    read = scoring(
        tmp_path / "one", [(0, 2, 1), (1,)], [row(0.2, 0.3, 0.5), row(0.6, 0.3, 0.1), row(1, 0, 0)], [row(1, 0, 0)]
    )
    assert negative_log_likelihood(read) == pytest.approx(-(log(0.5) + log(0.3)) / 2, rel=1e-6)
    assert np.exp(row_after(read, 0, 2)) == pytest.approx([0.6, 0.3, 0.1], rel=1e-6)
    assert negative_log_likelihood(scoring(tmp_path / "short", [(1,)], [row(1, 0, 0)])) is None


def test_vocabularies_of_different_sizes_are_compared_where_both_have_tokens(tmp_path: Path) -> None:
    """Some engines pad the vocabulary with ids that are never probable."""
    found = measure(
        scoring(tmp_path / "one", [(0,)], [row(0.5, 0.25, 0.25)]),
        scoring(tmp_path / "two", [(0,)], [row(0.5, 0.25, 0.25, 0)], vocabulary=4),
    )
    assert (found.vocabulary, found.max_abs, found.kl_max) == (3, 0, 0)


def test_scores_that_make_no_sense_are_refused_by_engine(tmp_path: Path) -> None:
    good = scoring(tmp_path / "good", [(0,)], [row(0.5, 0.25, 0.25)])
    with pytest.raises(CompareError, match=r"engine short: .*shape"):
        measure(good, scoring(tmp_path / "short", [(0,)], [row(0.5, 0.5)]))
    with pytest.raises(CompareError, match=r"engine broken: .*not a number"):
        measure(good, scoring(tmp_path / "broken", [(0,)], [np.array([0, np.nan, 0])]))


def test_the_margin_of_a_greedy_choice_is_its_lead() -> None:
    assert greedy_margin(row(0.6, 0.1, 0.3), 0, 2) == pytest.approx(log(2))
    assert greedy_margin(row(0.6, 0.1, 0.3), 0, 3) == inf


@pytest.mark.parametrize("size", [3, 3 * BLOCK])
def test_the_margin_of_a_seeded_choice_is_its_lead_in_the_draw(size: int) -> None:
    """Logits shifted by less than the margin leave the draw as it is; shifted by more, they turn it."""
    logits = np.random.default_rng(0).normal(0, 1, size).astype(np.float32)
    params = SamplingParams(seed=4)
    for position in range(20):
        (chosen,) = by_definition(logits, params, position)
        near = by_definition(logits, params, position, slack=3.0) - {chosen}
        for other in (token for token in near if token // BLOCK == chosen // BLOCK):
            scores = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits).sum())
            margin = seeded_margin(scores, 4, position, chosen, other)
            assert margin > 0
            shifted = logits.copy()
            shifted[other] += margin - 1e-3
            assert other not in by_definition(shifted, params, position)
    assert seeded_margin(row(0.5, 0.3, 0.2), 4, 0, 0, 3) == inf


def test_the_margin_between_blocks_is_the_lead_of_the_block() -> None:
    scores = np.log(np.full(2 * BLOCK, 1 / (2 * BLOCK)))
    first, second = gumbels(9, 5, np.array([BLOCK, BLOCK + 1]))
    assert seeded_margin(scores, 9, 5, 1, BLOCK + 1) == pytest.approx(first - second)
