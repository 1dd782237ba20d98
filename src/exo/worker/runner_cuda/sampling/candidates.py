"""Finds the few candidates of each row, and draws a token from each row's candidates, for all rows of a step at once.

Invariant: a row's token does not depend on the other rows. No sum runs over several rows or over padding, and no order
of additions depends on them.
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

LOWEST_LOGIT = np.finfo(np.float32).min
"""A smaller logit marks a token that is excluded."""


class NotFinite(Exception):  # noqa: N818 -- it names the logits' property
    """The row's largest logit is NaN or infinite: the computation went wrong for this sequence."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens of one row that may be drawn: at least one, in ascending order, including the largest logit's."""

    ids: Ids
    logits: Row
    temperature: float
    min_p: float
    top_p: float
    key: int
    """The key of the noise, from ``keyed_rng.key``."""


@dataclass(slots=True)
class _Pool:
    """The candidates of several rows, concatenated. ``rows`` ascend from 0, and each row has at least one."""

    rows: Ids
    ids: Ids
    weights: Weights
    """Probabilities divided by the row's largest one."""

    def keep(self, kept: Mask) -> "_Pool":
        """Returns the candidates for which ``kept`` is true."""
        return _Pool(self.rows[kept], self.ids[kept], self.weights[kept])


def largest(row: Row) -> np.float32:
    """Returns the largest logit. Raises NotFinite."""
    found = row.max()
    if not np.isfinite(found):
        raise NotFinite
    return found


def top_k(row: Row, k: int) -> Ids:
    """Returns the ids, ascending, of the k largest logits and of all equals of the k-th. Raises NotFinite.

    The row is folded into groups: logit i belongs to group i modulo the number of groups. The k-th largest of the
    groups' maxima is a lower bound of the k-th largest logit, because each of k groups has a logit of at least that
    size. Only the groups that reach the bound, about k, are searched. The cost is least with about sqrt(k * row.size)
    groups.
    """
    depth = 1 << isqrt(row.size // k).bit_length() >> 1
    if depth < 2:
        largest(row)
        (ids,) = (row >= LOWEST_LOGIT).nonzero()
    else:
        width = row.size // depth
        groups, rest = row[: depth * width].reshape(depth, width), row[depth * width :]
        # Two operands: ``max`` alone reads data that is not in the CPU's cache at half the speed.
        maxima = np.maximum(groups[: depth // 2], groups[depth // 2 :]).max(axis=0)
        best = np.partition(maxima, width - k)[width - k :]
        if rest.size:
            best = np.append(best, rest)
        largest(best)
        # If fewer than k groups have a token that is not excluded, all such tokens are candidates.
        bound = max(best[0], LOWEST_LOGIT)
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
    """Draws one token for each row: first a block of ids, then a token in it. See ``SamplingParams``."""
    pool = _weighed(candidates)
    if any(each.min_p > 0 for each in candidates):
        pool = pool.keep(pool.weights >= np.array([each.min_p for each in candidates])[pool.rows])
    if any(each.top_p < 1 for each in candidates):
        # A row without top-p needs an infinite share, which keeps all of its candidates.
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
    """Keeps each row's smallest set of heaviest candidates whose sum reaches its share; of equals, the lowest ids."""
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
    """Returns the index of each row's largest ln(weight) + noise; of equals, the first."""
    with np.errstate(divide="ignore"):
        scores = np.log(weights) + noise
    starts = _starts(rows)
    (best,) = (scores == np.maximum.reduceat(scores, starts)[rows]).nonzero()
    return best[np.searchsorted(best, starts)]


def _starts(keys: Ids) -> Ids:
    """Returns the index at which each run of equal keys begins."""
    begins = np.empty(keys.size, np.bool_)
    begins[0] = True
    np.not_equal(keys[1:], keys[:-1], out=begins[1:])
    return begins.nonzero()[0]
