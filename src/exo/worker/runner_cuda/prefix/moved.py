"""Finds the parts of a cached prompt that stand at another place in a new one."""

from array import array
from collections import defaultdict
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from exo.worker.runner_common.sequence import common_prefix

_BYTES = 4
"""Bytes of one token."""


@dataclass(frozen=True, slots=True)
class Move:
    """Cells of ``length`` tokens from position ``source`` on that are wanted from ``target`` on."""

    source: int
    target: int
    length: int

    @property
    def shift(self) -> int:
        """The number that each position grows by; negative for a move towards the start."""
        return self.target - self.source


def moved(cached: Tokens[int], prompt: Tokens[int], start: int, least: int) -> list[Move]:
    """Returns the parts of ``cached[start:]``, each of at least ``least`` tokens, that recur in ``prompt[start:]``.

    They are in ascending order in both. Tokens between two of them are in one text only.
    """
    size = least // 2  # a part of ``least`` tokens contains a whole window of the cached text
    old, new = array("i", cached).tobytes(), array("i", prompt).tobytes()
    windows: dict[bytes, list[int]] = defaultdict(list)
    for at in range(start, len(cached) - size + 1, size):
        windows[old[at * _BYTES : (at + size) * _BYTES]].append(at)
    found: list[Move] = []
    source = target = start  # where the last part ends
    at = start
    while at <= len(prompt) - size:
        places = windows.get(new[at * _BYTES : (at + size) * _BYTES], ())
        place = next((each for each in places if each >= source), None)
        if place is None:
            at += 1
            continue
        back = common_prefix(cached[max(source, place - size) : place][::-1], prompt[max(target, at - size) : at][::-1])
        if back + common_prefix(cached[place : place + least], prompt[at : at + least]) < least:
            at += 1
            continue
        length = back + common_prefix(cached[place:], prompt[at:])
        found.append(Move(place - back, at - back, length))
        source, target = place - back + length, at - back + length
        at = target
    return found


def in_order(moves: Tokens[Move]) -> list[Move]:
    """Returns moves in an order in which none of them overwrites the source of a later one."""
    return [move for move in moves if move.shift < 0] + [move for move in reversed(moves) if move.shift >= 0]
