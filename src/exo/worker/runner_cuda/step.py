"""The rows of one step: chunks of prompts, or the next rows of the decoding sequences."""

from dataclasses import dataclass, field

from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.vision.span import Span


@dataclass(slots=True)
class Chunk:
    """The rows of one sequence in a step: ``sequence.tokens[start:stop]``, then ``draft``."""

    sequence: Sequence
    start: int
    stop: int
    draft: list[int] = field(default_factory=list[int])
    """Guesses of the next tokens. Each gives logits too."""

    @property
    def n_rows(self) -> int:
        """The number of batch rows."""
        return self.stop - self.start + len(self.draft)

    @property
    def samples(self) -> bool:
        """Whether the chunk contains the last known token, so that a new token is sampled after it."""
        return self.stop == len(self.sequence.tokens)

    @property
    def n_sampled(self) -> int:
        """The number of rows, at the end, from whose logits tokens are sampled."""
        return 1 + len(self.draft) if self.samples else 0

    @property
    def n_scored(self) -> int:
        """The number of rows, at the beginning, that give the log-probability of the prompt's next token."""
        if self.sequence.prompt_logprobs is None:
            return 0
        return max(0, min(self.stop, self.sequence.n_prompt - 1) - self.start)


@dataclass(slots=True)
class Step:
    """One batch, with its chunks in the order of their rows.

    A step either decodes, with one row and perhaps a draft of every decoding sequence, or prefills chunks of prompts.
    A mixed batch would gain nothing: llama.cpp joins only as many rows of each sequence as all have, so it would
    compute the two parts one after the other, and every row would attend to as many cells as the longest sequence has.
    Tokens of a picture have a step of their own, since they are computed from vectors. The sequences of a step have the
    same adapters, because a context has them for all rows.
    """

    chunks: list[Chunk]
    started: list[tuple[str, int]]
    """The sequences that have entered a slot, by id, each with the number of its tokens found in the cache."""
    prefills: bool = False
    diverged: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    """Those among ``started`` whose prompts repeat a cached one after a difference, and the place of the difference."""

    @property
    def adapter(self) -> str:
        """The key of the adapters that all its sequences are computed with."""
        return self.chunks[0].sequence.adapter

    @property
    def picture(self) -> Span | None:
        """The picture to which the tokens of the only chunk belong; None in any other step."""
        return self.chunks[0].sequence.picture if self.chunks else None

    @property
    def n_rows(self) -> int:
        """The number of batch rows."""
        return sum(chunk.n_rows for chunk in self.chunks)
