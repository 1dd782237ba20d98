"""A place for one sequence: one row of the KV cache."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from exo.worker.runner_mlx.sequence import MlxSequence


@dataclass(slots=True)
class MlxSlot:
    """``cached`` are the tokens whose cells are in the cache; they stay after a sequence leaves, for the next one.

    Both it and ``n_written``, the cells that were ever written since they were last cleared, are up to date only while
    the slot is free.
    """

    id: int
    cached: list[int] = field(default_factory=list[int])
    n_written: int = 0
    sequence: MlxSequence | None = None

    def common_prefix(self, tokens: Tokens[int]) -> int:
        """How many leading tokens this slot already holds."""
        length = 0
        for mine, theirs in zip(self.cached, tokens, strict=False):
            if mine != theirs:
                break
            length += 1
        return length
