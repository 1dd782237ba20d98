"""A slot of the context: one llama.cpp sequence id with its own part of the split KV cache."""

import sys
from dataclasses import dataclass, field

from exo.worker.runner_cuda.sequence import Sequence


@dataclass(slots=True, eq=False)
class Slot:
    """``cached`` are the tokens with cells in the KV cache. They stay after a sequence leaves, for later prompts."""

    id: int
    cached: list[int] = field(default_factory=list[int])
    sequence: Sequence | None = None
    entered: int = 0
    """The running number of the last sequence that entered; 0 if there was none."""
    left: int = 0
    """The number of decode steps that had been computed when the last sequence left."""
    exact: int = sys.maxsize
    """The number of leading tokens whose cells were computed after the tokens that precede them now."""
    adapter: str = ""
    """The key of the adapters with which the cells were computed; empty if there were none."""

    @property
    def tokens(self) -> list[int]:
        """The tokens that are cached or will be, as far as known."""
        return self.cached if self.sequence is None else self.sequence.tokens
