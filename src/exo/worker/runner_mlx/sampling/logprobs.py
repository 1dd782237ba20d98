"""Computes log-probabilities from the unadjusted logits, on the device, for the rows whose requests want them."""

from typing import NamedTuple, cast

import mlx.core as mx

from exo.worker.runner_common.sequence import Scores

SUM_BLOCK = 512
"""Probabilities are summed in blocks, then the sums, because float32's rounding error grows with the terms of a sum."""

ROWS_AT_ONCE = 32
"""Prompt rows that are scored together. Each takes about 16 bytes for each token of the vocabulary."""


class ScoreArrays(NamedTuple):
    """``Scores`` of several rows, on the device."""

    chosen: mx.array
    """Log-probabilities of the given tokens, shape (rows,), float32."""
    ids: mx.array
    """The k most probable tokens, shape (rows, k), in descending order; of equals, the lowest id first."""
    top: mx.array
    """Log-probabilities of ``ids``, shape (rows, k), float32."""

    def read(self) -> list[Scores]:
        """Copies the scores to the host. Waits for the device."""
        chosen = cast(list[float], self.chosen.tolist())
        ids = cast(list[list[int]], self.ids.tolist())
        top = cast(list[list[float]], self.top.tolist())
        return [
            Scores(own, list(zip(*most_probable, strict=True)))
            for own, *most_probable in zip(chosen, ids, top, strict=True)
        ]


def score(logits: mx.array, tokens: mx.array, k: int) -> ScoreArrays:
    """Scores ``tokens``, shape (rows,), and the ``k`` most probable ones by logits of shape (rows, vocabulary).

    A row whose largest logit is NaN or infinite gets NaN scores.
    """
    logits = logits.astype(mx.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = mx.log(_sum(mx.exp(shifted)))
    ids = _largest(logits, min(k, logits.shape[1]))
    chosen = mx.take_along_axis(shifted, tokens[:, None], axis=-1) - total
    return ScoreArrays(chosen[:, 0], ids, mx.take_along_axis(shifted, ids, axis=-1) - total)


def _sum(weights: mx.array) -> mx.array:
    """Sums along each row. Returns shape (rows, 1)."""
    blocks = mx.unflatten(mx.pad(weights, [(0, 0), (0, -weights.shape[1] % SUM_BLOCK)]), -1, (-1, SUM_BLOCK))
    return blocks.sum(axis=-1).sum(axis=-1, keepdims=True)


def _largest(logits: mx.array, k: int) -> mx.array:
    """Returns the ids of each row's ``k`` largest logits, shape (rows, k), in descending order.

    Among equal logits, the lowest id comes first. The order is that of unique 64-bit keys. Their upper half has the
    bits of the float32, inverted if it is negative, which sort like the numbers. Their lower half is the inverted id.
    Adding 0 turns -0 into 0, whose bits differ.
    """
    n_vocab = logits.shape[1]
    if k == 0:
        return mx.zeros((logits.shape[0], 0), mx.int32)
    bits = (logits + 0.0).view(mx.int32)
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    keys = ordered * (1 << 32) + (n_vocab - 1 - mx.arange(n_vocab)).astype(mx.int64)
    largest = mx.sort(mx.topk(keys, k), axis=-1)[:, ::-1]
    return (n_vocab - 1 - (largest & 0xFFFFFFFF)).astype(mx.int32)
