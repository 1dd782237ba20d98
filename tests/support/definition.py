"""A plain implementation of ``messages.SamplingParams`` over the whole vocabulary, as a reference for the samplers."""

import numpy as np
from numpy.typing import NDArray

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.keyed_rng import BLOCK, gumbels

Row = NDArray[np.float32]


def kept(row: Row, params: SamplingParams) -> NDArray[np.float64]:
    """Unnormalised probabilities; zero for tokens that top-k, min-p or top-p drop."""
    scores = row.astype(np.float64)
    weights = np.exp((scores - scores.max()) / params.temperature)
    if 0 < params.top_k < scores.size:
        weights[scores < np.sort(scores)[-params.top_k]] = 0.0
    if params.min_p:
        weights[weights < params.min_p] = 0.0
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order]) / weights.sum()
        weights[order[int(np.argmax(reached >= params.top_p)) + 1 :]] = 0.0
    return weights


def winners(weights: NDArray[np.float64], noise: NDArray[np.float64], slack: float) -> list[int]:
    """The index of the largest ln(weight) + noise, or the indices of all within ``slack`` of it."""
    with np.errstate(divide="ignore"):
        scores = np.log(weights) + noise
    return [int(scores.argmax())] if slack == 0 else [int(at) for at in np.flatnonzero(scores >= scores.max() - slack)]


def by_definition(row: Row, params: SamplingParams, position: int, slack: float = 0.0) -> set[int]:
    """The token that the definition chooses; with ``slack``, all that it may choose if logits differ by so much."""
    if params.temperature == 0:
        return {int(row.argmax())}
    weights = kept(row, params)
    blocks = [weights[start : start + BLOCK] for start in range(0, weights.size, BLOCK)]
    sums = np.array([block.sum() for block in blocks])
    chosen: set[int] = set()
    for block in winners(sums, gumbels(params.seed, position, BLOCK + np.arange(len(blocks))), slack):
        noise = gumbels(params.seed, position, np.arange(blocks[block].size))
        chosen |= {block * BLOCK + token for token in winners(blocks[block], noise, slack)}
    return chosen
