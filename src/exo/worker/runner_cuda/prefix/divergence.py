"""Finds where a prompt departs from an earlier one, although much of what follows is the same."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Tokens

WORTH_TELLING = 512
"""The fewest tokens after the departure that must be the same."""
MAX_TOLD = 1000
"""The most divergences that are told of one model."""
_WINDOW = 32
"""Consecutive tokens that are compared together."""
_SAMPLES = 64
"""Windows of an earlier prompt that are looked for in the new one, spread evenly."""
_BYTES = 4
"""Bytes of one token."""


class Divergences:
    """The divergences of a model's prompts. ``last`` is the last one."""

    def __init__(self) -> None:
        self.last: int | None = None
        self._told: set[int] = set()

    def new(self, prompt: Tokens[int], earlier: Iterable[Tokens[int]], n_cached: int) -> int | None:
        """Returns the ``divergence``; None if the same place has been returned before."""
        at = divergence(prompt, earlier, n_cached)
        if at is not None:
            self.last = at
        if at is None or at in self._told or len(self._told) == MAX_TOLD:
            return None
        self._told.add(at)
        return at


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
