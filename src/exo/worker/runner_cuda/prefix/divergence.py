"""Finds where a prompt departs from an earlier one, although much of what follows is the same."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Tokens

WORTH_TELLING = 512
"""The fewest tokens after the departure that must be the same."""
_WINDOW = 32
"""Consecutive tokens that are compared together."""
_SAMPLES = 64
"""Windows of an earlier prompt that are looked for in the new one, spread evenly."""
_BYTES = 4
"""Bytes of one token."""


def divergence(prompt: Tokens[int], earlier: Iterable[Tokens[int]], n_cached: int) -> int | None:
    """Returns the length of the common prefix with the earlier prompt whose rest recurs most often in ``prompt``.

    Only what follows the first ``n_cached`` tokens counts. None if about ``WORTH_TELLING`` tokens recur in no case.
    """
    if len(prompt) - n_cached < WORTH_TELLING:
        return None
    candidates = [each for each in earlier if len(each) >= WORTH_TELLING]
    if not candidates:
        return None
    new = array("i", prompt[n_cached:]).tobytes()
    windows = {new[at : at + _WINDOW * _BYTES] for at in range(0, len(new) - _WINDOW * _BYTES + 1, _BYTES)}
    most, found = WORTH_TELLING - 1, None
    for tokens in candidates:
        common = next((at for at, pair in enumerate(zip(prompt, tokens, strict=False)) if pair[0] != pair[1]), None)
        if common is None:  # one is a prefix of the other
            continue
        rest = array("i", tokens[common:]).tobytes()
        step = max(_WINDOW, len(tokens[common:]) // _SAMPLES)
        starts = range(0, len(rest) - _WINDOW * _BYTES + 1, step * _BYTES)
        recurring = step * sum(rest[at : at + _WINDOW * _BYTES] in windows for at in starts)
        if recurring > most:
            most, found = recurring, common
    return found
