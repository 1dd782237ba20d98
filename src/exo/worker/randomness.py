"""Randomness keyed by (seed, position) instead of by a generator's history.

A request therefore draws the same numbers alone, in a batch, after a replay and on another engine.
"""

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at ``position``, counted from the first prompt token."""
    state = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    return (_mix((state + position * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53
