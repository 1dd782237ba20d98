"""A step that the device computes, and what it brings."""

from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from exo.worker.runner_common.output_processor import Scores
from exo.worker.runner_mlx.logprobs import ScoreArrays
from exo.worker.runner_mlx.model import wait_for
from exo.worker.runner_mlx.sampler import FAILED
from exo.worker.runner_mlx.scheduler import DecodeRow, MlxStep
from exo.worker.runner_mlx.sequence import MlxSequence


@dataclass(slots=True)
class Queued:
    """``held`` until a grammar has seen the tokens of the step before; then the rest of it is queued too."""

    step: MlxStep
    held: mx.array | None = None
    """Logits that nothing is chosen from yet, shape (rows, vocabulary)."""
    done: mx.array = field(init=False)
    """The rows' tokens, shape (rows,), or any number if the step has none. Missing while the logits are held."""
    matched: set[str] = field(default_factory=set[str])
    """Requests whose grammar leaves nothing but an end, which they ignore: they end without a token."""
    scores: tuple[list[MlxSequence], ScoreArrays] | None = None
    """How probable these tokens were, of the sequences that ask for it."""
    prompts: list[tuple[MlxSequence, ScoreArrays]] = field(default_factory=list[tuple[MlxSequence, ScoreArrays]])
    """The same of the tokens that follow those of prompt chunks."""

    def wait(self) -> None:
        """Until all of it is computed."""
        wait_for(self.done, self.scores and self.scores[1], [arrays for _, arrays in self.prompts])

    def tokens(self) -> list[int]:
        """One for each row."""
        return cast(list[int], self.done.tolist()) if self.step.rows else []

    def token_scores(self) -> dict[str, Scores]:
        """Of the rows' tokens, by request."""
        if self.scores is None:
            return {}
        sequences, arrays = self.scores
        return {
            sequence.id: Scores(row.chosen, row.top[: sequence.logprobs])
            for sequence, row in zip(sequences, arrays.read(), strict=True)
        }


def inputs(rows: list[DecodeRow], before: Queued | None) -> tuple[mx.array, mx.array | None]:
    """Each row's input token, and those of them that only the device knows yet (elsewhere ``FAILED``).

    A decoding sequence has a row in every step, so a token that is not known yet is one of the step before.
    """
    known = [row.sequence.tokens[row.position] if row.position < len(row.sequence.tokens) else FAILED for row in rows]
    tokens = mx.array(known)
    if before is None or FAILED not in known:
        return tokens, None
    places = {id(row.sequence): place for place, row in enumerate(before.step.rows)}
    unread = mx.where(tokens == FAILED, before.done[mx.array([places.get(id(r.sequence), 0) for r in rows])], FAILED)
    return mx.where(tokens == FAILED, unread, tokens), unread
