"""How probable tokens were by the model alone: computed on the device, for the rows that ask, from the raw logits."""

from typing import NamedTuple, cast

import mlx.core as mx

from exo.worker.runner_common.output_processor import Scores

SUM_BLOCK = 512
"""Probabilities are summed in blocks, then these sums: what float32 rounds off grows with the terms of one sum."""

ROWS_AT_ONCE = 32
"""Rows of a prompt that are looked at together: each takes some 16 bytes for each token of the vocabulary."""


class ScoreArrays(NamedTuple):
    """``Scores`` on the device, of one place a row."""

    chosen: mx.array
    """Of the tokens given, shape (rows,), float32."""
    ids: mx.array
    """The k most probable tokens, shape (rows, k), the most probable first, the lowest id first among equals."""
    top: mx.array
    """Their log-probabilities, shape (rows, k), float32."""

    def read(self) -> list[Scores]:
        """The same on the host. Waits."""
        chosen = cast(list[float], self.chosen.tolist())
        ids = cast(list[list[int]], self.ids.tolist())
        top = cast(list[list[float]], self.top.tolist())
        return [
            Scores(own, list(zip(*most_probable, strict=True)))
            for own, *most_probable in zip(chosen, ids, top, strict=True)
        ]


def score(logits: mx.array, tokens: mx.array, k: int) -> ScoreArrays:
    """Of ``tokens``, shape (rows,), and of the ``k`` most probable, by logits of shape (rows, vocabulary).

    All of a row are NaN where its largest logit is NaN or infinite.
    """
    logits = logits.astype(mx.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = mx.log(_sum(mx.exp(shifted)))
    ids = _largest(logits, min(k, logits.shape[1]))
    chosen = mx.take_along_axis(shifted, tokens[:, None], axis=-1) - total
    return ScoreArrays(chosen[:, 0], ids, mx.take_along_axis(shifted, ids, axis=-1) - total)


def _sum(weights: mx.array) -> mx.array:
    """Along each row; shape (rows, 1)."""
    blocks = mx.unflatten(mx.pad(weights, [(0, 0), (0, -weights.shape[1] % SUM_BLOCK)]), -1, (-1, SUM_BLOCK))
    return blocks.sum(axis=-1).sum(axis=-1, keepdims=True)


def _largest(logits: mx.array, k: int) -> mx.array:
    """Ids of the ``k`` largest of each row, in descending order, the lowest id first among equals; shape (rows, k).

    Of 64-bit keys, as no two are equal: the bits of a float32, turned around where it is negative, are ordered as the
    numbers are; below them comes the id, turned around. 0 is added since -0 has other bits than 0.
    """
    n_vocab = logits.shape[1]
    if k == 0:
        return mx.zeros((logits.shape[0], 0), mx.int32)
    bits = (logits + 0.0).view(mx.int32)
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    keys = ordered * (1 << 32) + (n_vocab - 1 - mx.arange(n_vocab)).astype(mx.int64)
    largest = mx.sort(mx.topk(keys, k), axis=-1)[:, ::-1]
    return (n_vocab - 1 - (largest & 0xFFFFFFFF)).astype(mx.int32)
