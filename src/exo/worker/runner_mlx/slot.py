"""A slot for one sequence: one row of the KV cache."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from exo.worker.runner_mlx.sequence import MlxSequence


@dataclass(slots=True)
class MlxSlot:
    """``cached`` are the tokens with usable cells, which stay after a sequence leaves, for later prompts.

    ``n_written`` is the number of cells written since they were last cleared. Both are valid only while the slot is
    free.
    """

    id: int
    cached: list[int] = field(default_factory=list[int])
    n_written: int = 0
    sequence: MlxSequence | None = None

    def common_prefix(self, tokens: Tokens[int]) -> int:
        """Returns how many leading ``tokens`` are cached here."""
        length = 0
        for mine, theirs in zip(self.cached, tokens, strict=False):
            if mine != theirs:
                break
            length += 1
        return length
