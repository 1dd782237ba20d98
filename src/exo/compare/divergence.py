"""Computes the differences of log-probabilities. Needs NumPy, which comes with every engine.

Files are memory-mapped and read row by row in float64, so a few rows are in memory at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from exo.compare.comparison import CompareError, Divergence, PositionDivergence
from exo.compare.scoring import Scoring
from exo.worker.runner_common.keyed_rng import BLOCK, gumbels

Row = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowDivergence:
    """The divergence of two distributions of one next token, in nats."""

    max_abs: float
    mean_abs: float
    kl: float
    same_top: bool


def compare_rows(reference: Row, other: Row) -> RowDivergence:
    """Compares two rows of log-probabilities, shape (vocabulary,). A token that both rule out has no difference.

    KL is the sum of P log(P/Q) - P + Q. The last two terms sum to 0. With them every summand is at least 0, and the
    rounding of the files to float32 cancels to first order, which matters if the engines nearly agree.
    """
    with np.errstate(invalid="ignore"):  # -inf minus -inf
        gap = np.where(reference == other, 0.0, reference - other)
    p, q = np.exp(reference), np.exp(other)
    kl = float(np.dot(p[p > 0], gap[p > 0]) - p.sum() + q.sum())
    size = np.abs(gap)
    return RowDivergence(
        float(size.max()), float(size.mean()), max(kl, 0.0), bool(reference.argmax() == other.argmax())
    )


def measure(reference: Scoring, other: Scoring) -> Divergence:
    """The divergence over all rows. Both scorings have the same tokens. Raises CompareError for invalid files."""
    width = min(reference.capabilities.vocabulary, other.capabilities.vocabulary)
    rows: list[list[RowDivergence]] = []
    for index, tokens in enumerate(reference.tokens):
        one, two = _open(reference, index), _open(other, index)
        for position in range(len(tokens)):
            if position == len(rows):
                rows.append([])
            left, right = (_row(file[position], who) for file, who in ((one, reference), (two, other)))
            rows[position].append(compare_rows(left[:width], right[:width]))
    every = [row for at_position in rows for row in at_position]
    return Divergence(
        positions=len(every),
        vocabulary=width,
        max_abs=max(row.max_abs for row in every),
        mean_abs=_mean([row.mean_abs for row in every]),
        kl_mean=_mean([row.kl for row in every]),
        kl_max=max(row.kl for row in every),
        top1_agreement=_mean([row.same_top for row in every]),
        by_position=tuple(_at(position, found) for position, found in enumerate(rows)),
    )


def negative_log_likelihood(scoring: Scoring) -> float | None:
    """The mean in nats per token, without the first token of each text; None if there are no others."""
    found: list[float] = []
    for index, tokens in enumerate(scoring.tokens):
        file = _open(scoring, index)
        found += [-float(file[position, token]) for position, token in enumerate(tokens[1:])]
    return _mean(found) if found else None


def row_after(scoring: Scoring, index: int, n_tokens: int) -> Row:
    """Log-probabilities of the token after the first ``n_tokens`` of text ``index``. Raises CompareError."""
    return _row(_open(scoring, index)[n_tokens - 1], scoring)


def greedy_margin(row: Row, chosen: int, other: int) -> float:
    """The lead of the chosen token in nats; infinite over a token that this engine does not have."""
    return float(row[chosen] - row[other]) if other < row.size else inf


def seeded_margin(row: Row, seed: int, position: int, chosen: int, other: int) -> float:
    """The lead of the chosen token in nats in the draw of ``SamplingParams``, step 5; infinite as above.

    Compares the noisy scores of the tokens if they are in one block, else those of their blocks. A row does not show
    which tokens end the generation. They were ruled out, and are assumed to be improbable.
    """
    if other >= row.size:
        return inf
    tokens = np.array([chosen, other])
    blocks = tokens // BLOCK
    if blocks[0] == blocks[1]:
        scores = row[tokens] + gumbels(seed, position, tokens % BLOCK)
    else:
        sums = [np.exp(row[block * BLOCK : (block + 1) * BLOCK]).sum() for block in blocks]
        scores = np.log(sums) + gumbels(seed, position, BLOCK + blocks)
    return float(scores[0] - scores[1])


def _open(scoring: Scoring, index: int) -> npt.NDArray[np.float32]:
    """Shape (tokens, vocabulary)."""
    file: npt.NDArray[np.float32] = np.load(scoring.files[index], mmap_mode="r")
    expected = (len(scoring.tokens[index]), scoring.capabilities.vocabulary)
    if file.shape != expected:
        raise CompareError(f"engine {scoring.engine}: scores have shape {file.shape}, expected {expected}")
    return file


def _row(row: npt.NDArray[np.float32], scoring: Scoring) -> Row:
    if np.isnan(row).any():
        raise CompareError(f"engine {scoring.engine}: it computed a log-probability that is not a number")
    return row.astype(np.float64)


def _at(position: int, found: Sequence[RowDivergence]) -> PositionDivergence:
    return PositionDivergence(
        position=position,
        sequences=len(found),
        max_abs=max(row.max_abs for row in found),
        mean_abs=_mean([row.mean_abs for row in found]),
        kl=_mean([row.kl for row in found]),
    )


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers, dtype=np.float64))
