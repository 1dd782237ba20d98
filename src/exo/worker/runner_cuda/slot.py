"""A place in the context: one llama.cpp sequence id with its own part of the split KV cache."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from exo.worker.runner_cuda.sequence import Sequence


@dataclass(slots=True)
class Slot:
    """``cached`` are the tokens whose cells are in the cache; they stay after a sequence leaves, for the next one."""

    id: int
    cached: list[int] = field(default_factory=list[int])
    sequence: Sequence | None = None

    def common_prefix(self, tokens: Tokens[int]) -> int:
        """How many leading tokens this slot already holds."""
        length = 0
        for mine, theirs in zip(self.cached, tokens, strict=False):
            if mine != theirs:
                break
            length += 1
        return length
