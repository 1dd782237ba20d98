"""Randomness keyed by (seed, position) instead of by a generator's history.

A request therefore draws the same numbers alone, in a batch, after a replay and on another engine. At every position
there are many streams of numbers, since choosing one of several tokens takes one number for each.
"""

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15

Numbers = npt.NDArray[np.float64]
Keys = npt.NDArray[np.uint64] | np.uint64

BLOCK = 512
"""Token ids that are drawn from together; see ``messages.SamplingParams``."""


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _mix_all(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """``_mix`` of each; arrays of unsigned integers wrap around by themselves."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key(seed: int, position: int) -> int:
    """Returns the key of the random numbers at ``position``, counted from the first prompt token."""
    return _mix((_mix((seed + _GAMMA) & _MASK) + position * _GAMMA) & _MASK)


def uniforms(seed: int, position: int, streams: npt.NDArray[np.integer]) -> Numbers:
    """Numbers strictly between 0 and 1, one for each stream, at ``position``."""
    return _keyed_uniforms(np.uint64(key(seed, position)), streams)


def gumbels(seed: int, position: int, streams: npt.NDArray[np.integer]) -> Numbers:
    """Gumbel-distributed noise, -ln(-ln u), for each stream.

    The index of the largest ln(w) + noise is distributed as the weights w are (Gumbel, "Statistical theory of extreme
    values", 1954). Unlike an interval of the running sum, which every weight before it can shift, the winner changes
    only where two candidates are as good as tied: rounding seldom makes another token of it.
    """
    return keyed_gumbels(np.uint64(key(seed, position)), streams)


def keyed_gumbels(keys: Keys, streams: npt.NDArray[np.integer]) -> Numbers:
    """``gumbels`` for each stream, of the same shape as ``keys``: what ``key`` gives for its seed and position."""
    return -np.log(-np.log(_keyed_uniforms(keys, streams)))


def _keyed_uniforms(keys: Keys, streams: npt.NDArray[np.integer]) -> Numbers:
    bits = _mix_all(keys + streams.astype(np.uint64) * np.uint64(_GAMMA))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
