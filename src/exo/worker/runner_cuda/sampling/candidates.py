"""Finds the few tokens of a row that may be drawn, and draws for all rows of a step at once.

No sum runs over several rows or over padding, and no order of additions depends on either: a row's token is the same
in any company.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
import numpy.typing as npt

from exo.worker.runner_common.keyed_rng import BLOCK, keyed_gumbels

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
Weights = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LEAST = np.finfo(np.float32).min
"""Smaller logits are those of tokens left out."""


class NotFinite(Exception):  # noqa: N818 -- it names what the logits are
    """The row's largest logit is NaN or infinite: the computation went wrong for this sequence."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that one is to be drawn from: at least one, in ascending order, the largest logit among them."""

    ids: Ids
    logits: Row
    temperature: float
    min_p: float
    top_p: float
    key: int
    """Of the noise: ``randomness.key``."""


@dataclass(slots=True)
class _Pool:
    """The candidates of several rows one after another; ``rows`` ascend from 0, and each has at least one."""

    rows: Ids
    ids: Ids
    weights: Weights
    """Probabilities as multiples of the row's largest."""

    def keep(self, kept: Mask) -> "_Pool":
        """Without the others."""
        return _Pool(self.rows[kept], self.ids[kept], self.weights[kept])


def largest(row: Row) -> np.float32:
    """The largest logit. Raises NotFinite."""
    found = row.max()
    if not np.isfinite(found):
        raise NotFinite
    return found


def top_k(row: Row, k: int) -> Ids:
    """Ids, ascending, of the k largest logits and of all equals of the k-th. Raises NotFinite.

    The row is folded into groups: logit i is of group i modulo their number. The k-th largest of their maxima is a
    lower bound of the k-th largest logit, since each of k groups holds at least one logit that large. So only the
    groups reaching it, about k, are looked at. That takes least where there are about as many groups as the root of k
    times the row's length.
    """
    depth = 1 << isqrt(row.size // k).bit_length() >> 1
    if depth < 2:
        largest(row)
        (ids,) = (row >= LEAST).nonzero()
    else:
        width = row.size // depth
        groups, rest = row[: depth * width].reshape(depth, width), row[depth * width :]
        # Two operands, since ``max`` alone reads half as fast what is not in the processor's cache.
        maxima = np.maximum(groups[: depth // 2], groups[depth // 2 :]).max(axis=0)
        best = np.partition(maxima, width - k)[width - k :]
        if rest.size:
            best = np.append(best, rest)
        largest(best)
        # Where fewer groups have a token left, all tokens left are looked at.
        bound = max(best[0], LEAST)
        (reaching,) = (maxima >= bound).nonzero()
        members, places = (groups[:, reaching] >= bound).nonzero()
        ids = members * width + reaching[places]
        if rest.size:
            ids = np.append(ids, (rest >= bound).nonzero()[0] + depth * width)
    if ids.size > k:
        logits = row[ids]
        ids = ids[logits >= np.partition(logits, ids.size - k)[ids.size - k]]
    return ids


def draw(candidates: Sequence[Candidates]) -> list[int]:
    """One token of each: the block of ids first, then the token in it."""
    pool = _weighed(candidates)
    if any(each.min_p > 0 for each in candidates):
        pool = pool.keep(pool.weights >= np.array([each.min_p for each in candidates])[pool.rows])
    if any(each.top_p < 1 for each in candidates):
        # What is to reach an infinite sum is kept whole.
        pool = _top_p(pool, np.array([each.top_p if each.top_p < 1 else np.inf for each in candidates]))
    keys = np.array([each.key for each in candidates], np.uint64)
    blocks, places = np.divmod(pool.ids, BLOCK)
    firsts = _starts(pool.rows * (int(blocks.max()) + 1) + blocks)
    rows, n = np.concatenate((pool.rows[firsts], pool.rows)), firsts.size
    noise = keyed_gumbels(keys[rows], np.concatenate((BLOCK + blocks[firsts], places)))
    block = blocks[firsts[_winners(np.add.reduceat(pool.weights, firsts), noise[:n], rows[:n])]]
    (inside,) = (blocks == block[pool.rows]).nonzero()
    return pool.ids[inside[_winners(pool.weights[inside], noise[n:][inside], pool.rows[inside])]].tolist()


def _weighed(candidates: Sequence[Candidates]) -> _Pool:
    rows = np.repeat(np.arange(len(candidates)), [each.ids.size for each in candidates])
    logits = np.concatenate([each.logits for each in candidates]).astype(np.float64)
    logits -= np.maximum.reduceat(logits, _starts(rows))[rows]
    logits /= np.array([each.temperature for each in candidates])[rows]
    return _Pool(rows, np.concatenate([each.ids for each in candidates]), np.exp(logits))


def _top_p(pool: _Pool, shares: Weights) -> _Pool:
    """The smallest set of each row's heaviest that reaches its share; of equals at the border the lowest ids."""
    order = np.lexsort((-pool.weights, pool.rows))
    weights, starts = pool.weights[order], _starts(pool.rows)
    ends = np.append(starts[1:], weights.size)
    reached = np.empty_like(weights)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        np.cumsum(weights[start:end], out=reached[start:end])
    short = reached < (shares * reached[ends - 1])[pool.rows]
    kept = np.empty(weights.size, np.bool_)
    kept[order[1:]] = short[:-1]
    kept[order[starts]] = True
    return pool.keep(kept)


def _winners(weights: Weights, noise: Weights, rows: Ids) -> Ids:
    """Index of each row's largest ln(weight) + noise; of equals the first."""
    with np.errstate(divide="ignore"):
        scores = np.log(weights) + noise
    starts = _starts(rows)
    (best,) = (scores == np.maximum.reduceat(scores, starts)[rows]).nonzero()
    return best[np.searchsorted(best, starts)]


def _starts(keys: Ids) -> Ids:
    """Where each run of equals begins."""
    begins = np.empty(keys.size, np.bool_)
    begins[0] = True
    np.not_equal(keys[1:], keys[:-1], out=begins[1:])
    return begins.nonzero()[0]
