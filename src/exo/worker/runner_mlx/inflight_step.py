"""A step that the device is computing, and its results."""

from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from exo.worker.runner_common.sequence import Scores
from exo.worker.runner_mlx.model import wait_for
from exo.worker.runner_mlx.sampling.logprobs import ScoreArrays
from exo.worker.runner_mlx.sampling.sampler import FAILED
from exo.worker.runner_mlx.scheduler import DecodeRow, MlxStep
from exo.worker.runner_mlx.sequence import MlxSequence


@dataclass(slots=True)
class InflightStep:
    """A queued step. With a grammar, sampling is queued only when the tokens of the step before are known."""

    step: MlxStep
    held: mx.array | None = None
    """Logits whose sampling is not queued yet, shape (rows, vocabulary)."""
    done: mx.array = field(init=False)
    """The rows' tokens, shape (rows,), or a scalar if the step has no rows. Missing while the logits are held."""
    matched: set[str] = field(default_factory=set[str])
    """Requests whose grammar allows only an end, which they ignore: they end without a token."""
    scores: tuple[list[MlxSequence], ScoreArrays] | None = None
    """Scores of the rows' tokens, for the sequences that want them."""
    prompts: list[tuple[MlxSequence, ScoreArrays]] = field(default_factory=list[tuple[MlxSequence, ScoreArrays]])
    """Scores of the tokens that follow those of prompt chunks."""

    def wait(self) -> None:
        """Waits until everything is computed."""
        wait_for(self.done, self.scores and self.scores[1], [arrays for _, arrays in self.prompts])

    def tokens(self) -> list[int]:
        """Returns one token for each row."""
        return cast(list[int], self.done.tolist()) if self.step.rows else []

    def token_scores(self) -> dict[str, Scores]:
        """Returns the scores of the rows' tokens, by request."""
        if self.scores is None:
            return {}
        sequences, arrays = self.scores
        return {
            sequence.id: Scores(row.chosen, row.top[: sequence.logprobs])
            for sequence, row in zip(sequences, arrays.read(), strict=True)
        }


def inputs(rows: list[DecodeRow], before: InflightStep | None) -> tuple[mx.array, mx.array | None]:
    """Returns each row's input token, and the tokens that only the device knows yet (``FAILED`` in other rows).

    A decoding sequence has a row in every step, so an unknown token is a result of the step before.
    """
    known = [row.sequence.tokens[row.position] if row.position < len(row.sequence.tokens) else FAILED for row in rows]
    tokens = mx.array(known)
    if before is None or FAILED not in known:
        return tokens, None
    places = {id(row.sequence): place for place, row in enumerate(before.step.rows)}
    unread = mx.where(tokens == FAILED, before.done[mx.array([places.get(id(r.sequence), 0) for r in rows])], FAILED)
    return mx.where(tokens == FAILED, unread, tokens), unread
