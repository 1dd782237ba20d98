"""Chooses the tokens of a step on the device, by the semantics of ``messages.SamplingParams``.

Rows that need the same kinds of computation share one, whatever their parameters: these are columns of arrays. All of
it is queued behind the forward pass, so nothing waits for the host.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from exo.worker.runner_common.keyed_rng import BLOCK, gumbels
from exo.worker.runner_mlx.sequence import MlxSequence

FAILED = -1
"""In place of a token, where the row's largest logit is NaN or infinite: the computation went wrong there."""

SUM_BLOCK = 64
"""Probabilities are summed in blocks, and blocks of these: what float32 rounds off grows with the terms of one sum."""

SMALLEST = 1e-30
"""A temperature or a weight that is not 0 in float32."""


class Kind(NamedTuple):
    """What a row's choice takes. Rows of one kind are computed together."""

    penalised: bool
    biased: bool
    greedy: bool
    top_k: int
    """0 for all tokens. Part of the kind, since it is the width of an array."""
    min_p: bool
    top_p: bool


def kind_of(sequence: MlxSequence, n_vocab: int) -> Kind:
    """The kind of a sequence; of a greedy one the rest does not matter."""
    params = sequence.sampling
    greedy = params.temperature == 0
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return Kind(
        penalised=penalised,
        biased=bool(params.logit_bias or sequence.forbidden),
        greedy=greedy,
        top_k=0 if greedy or params.top_k >= n_vocab else params.top_k,
        min_p=not greedy and params.min_p > 0,
        top_p=not greedy and params.top_p < 1,
    )


class MlxSampler:
    """The choices of given sequences, row by row; made anew whenever other sequences take part in a step."""

    def __init__(self, sequences: Rows[MlxSequence], n_vocab: int, unread: mx.array | None = None) -> None:
        """``unread``, shape (rows,), are tokens queued but not yet in ``MlxSequence.tokens``; ``FAILED`` for none."""
        kinds = [kind_of(sequence, n_vocab) for sequence in sequences]
        rows_of = {kind: [row for row, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
        self._groups: list[tuple[list[int], Group]] = []
        for kind, rows in rows_of.items():
            theirs = None if unread is None else unread[mx.array(rows)]
            self._groups.append((rows, Group(kind, [sequences[row] for row in rows], n_vocab, theirs)))
        order = [row for rows in rows_of.values() for row in rows]
        self._places = mx.array(sorted(range(len(order)), key=order.__getitem__))

    def choose(self, logits: mx.array, positions: Rows[int], allowed: mx.array | None = None) -> mx.array:
        """The tokens at ``positions`` from logits of shape (rows, vocabulary); shape (rows,), int32.

        ``allowed``, of the logits' shape, is false for the tokens that a grammar leaves out.
        """
        if allowed is not None:
            logits = mx.where(allowed, logits, -mx.inf)
        if len(self._groups) == 1:
            return self._groups[0][1].choose(logits, positions)
        chosen = [
            group.choose(logits[mx.array(rows)], [positions[row] for row in rows]) for rows, group in self._groups
        ]
        return mx.concatenate(chosen)[self._places]


class Group:
    """Rows of one kind."""

    def __init__(self, kind: Kind, sequences: Rows[MlxSequence], n_vocab: int, unread: mx.array | None) -> None:
        self._kind = kind
        self._params = [sequence.sampling for sequence in sequences]
        self._seeds = [params.seed for params in self._params]
        if kind.penalised:
            self._start_history(sequences, n_vocab, unread)
        if kind.biased:
            self._bias = _bias(sequences, n_vocab)
        if not kind.greedy:
            self._temperature = _column(max(params.temperature, SMALLEST) for params in self._params)
            self._min_p = _column(params.min_p for params in self._params)
            self._top_p = _column(params.top_p for params in self._params)

    def choose(self, logits: mx.array, positions: Rows[int]) -> mx.array:
        """As ``MlxSampler.choose``, for these rows."""
        logits = logits.astype(mx.float32)
        if self._kind.penalised:
            logits = self._penalise(logits)
        if self._kind.biased:
            logits = logits + self._bias
        top = logits.max(axis=-1, keepdims=True)
        if self._kind.greedy:
            token = logits.argmax(axis=-1)
        else:
            weights = self._keep(logits, top)
            token = _draw(weights, _noise(self._seeds, positions, weights.shape[1]))
        token = mx.where(mx.abs(top[:, 0]) < mx.inf, token.astype(mx.int32), FAILED)
        if self._kind.penalised:
            self._accept(token)
        return token

    # --- penalties ---

    def _start_history(self, sequences: Rows[MlxSequence], n_vocab: int, unread: mx.array | None) -> None:
        """Tokens so far, shape (rows, vocabulary): how often in the output, and whether in prompt or output."""
        self._counts = _count([sequence.tokens[sequence.n_prompt :] for sequence in sequences], n_vocab)
        self._seen = _count([sequence.tokens for sequence in sequences], n_vocab) > 0
        self._ids = mx.arange(n_vocab)
        self._repetition = _column(params.repetition_penalty for params in self._params)
        self._presence = _column(params.presence_penalty for params in self._params)
        self._frequency = _column(params.frequency_penalty for params in self._params)
        if unread is not None:
            self._accept(unread)

    def _penalise(self, logits: mx.array) -> mx.array:
        harder = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits = mx.where(self._seen, harder, logits)
        return logits - mx.where(self._counts > 0, self._presence + self._frequency * self._counts, 0.0)

    def _accept(self, tokens: mx.array) -> None:
        new = self._ids == tokens[:, None]
        self._counts = self._counts + new
        self._seen = self._seen | new

    # --- what may be drawn ---

    def _keep(self, logits: mx.array, top: mx.array) -> mx.array:
        """Unnormalised probabilities, shape (rows, vocabulary), zero for what top-k, min-p or top-p leave out."""
        kind = self._kind

        def weigh(part: mx.array) -> mx.array:
            weights = mx.exp((part - top) / self._temperature)
            return mx.where(weights >= self._min_p, weights, 0.0) if kind.min_p else weights

        weights = weigh(logits)
        if not (kind.top_k or kind.top_p):
            return weights
        largest = _descending(mx.topk(logits, kind.top_k) if kind.top_k else logits)
        if kind.top_k:
            weights = mx.where(logits >= largest[:, -1:], weights, 0.0)
        if kind.top_p:
            weights = _top_p(logits, weights, largest, weigh(largest), self._top_p)
        return weights


def _top_p(logits: mx.array, weights: mx.array, largest: mx.array, heaviest: mx.array, share: mx.array) -> mx.array:
    """Weights of the smallest set of the heaviest whose sum reaches ``share``; of equals at the border the lowest ids.

    ``largest`` and ``heaviest`` are logits and weights in descending order, either all or the top-k. Then more tokens
    than those may have weight, equals of the last one.
    """
    running = _running_sums(heaviest)
    last = heaviest[:, -1:]
    n_more = (weights > 0).sum(axis=-1, keepdims=True) - (heaviest > 0).sum(axis=-1, keepdims=True)
    target = share * (running[:, -1:] + n_more * last)
    n_within = (running < target).sum(axis=-1, keepdims=True) + 1
    lacking = mx.ceil((target - running[:, -1:]) / mx.maximum(last, SMALLEST)).astype(mx.int32)
    n_kept = mx.where(running[:, -1:] >= target, n_within, largest.shape[1] + mx.minimum(lacking, n_more))
    border = mx.take_along_axis(largest, mx.minimum(n_kept, largest.shape[1]) - 1, axis=-1)
    is_equal = logits == border
    n_equal = n_kept - (largest > border).sum(axis=-1, keepdims=True)
    kept = (logits > border) | (is_equal & (mx.cumsum(is_equal.astype(mx.int32), axis=-1) <= n_equal))
    return mx.where(kept, weights, 0.0)


def _draw(weights: mx.array, noise: mx.array) -> mx.array:
    """A token for each row: the block of ids first, then the token in it.

    ``weights`` have the shape (rows, vocabulary), ``noise`` (rows, BLOCK + blocks), in order of stream.
    """
    blocks = mx.unflatten(mx.pad(weights, [(0, 0), (0, -weights.shape[1] % BLOCK)]), -1, (-1, BLOCK))
    block = (mx.log(blocks.sum(axis=-1)) + noise[:, BLOCK:]).argmax(axis=-1)
    inside = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + (mx.log(inside) + noise[:, :BLOCK]).argmax(axis=-1)


def _running_sums(weights: mx.array) -> mx.array:
    """Along each row."""
    width = weights.shape[1]
    if width <= 8 * SUM_BLOCK:
        return mx.cumsum(weights, axis=-1)
    blocks = mx.unflatten(mx.pad(weights, [(0, 0), (0, -width % SUM_BLOCK)]), -1, (-1, SUM_BLOCK))
    inside = mx.cumsum(blocks, axis=-1)
    before = mx.pad(_running_sums(inside[:, :, -1])[:, :-1], [(0, 0), (1, 0)])
    return mx.flatten(inside + before[:, :, None], 1)[:, :width]


def _descending(values: mx.array) -> mx.array:
    return -mx.sort(-values, axis=-1)


def _noise(seeds: Rows[int], positions: Rows[int], n_vocab: int) -> mx.array:
    """Shape (rows, BLOCK + blocks of the vocabulary), float32."""
    streams = np.arange(BLOCK + -(-n_vocab // BLOCK))
    return mx.array(np.stack([gumbels(*key, streams) for key in zip(seeds, positions, strict=True)]).astype(np.float32))


def _column(numbers: Iterable[float]) -> mx.array:
    """Shape (rows, 1), float32."""
    return mx.array(list(numbers), mx.float32)[:, None]


def _count(lists: Rows[Rows[int]], n_vocab: int) -> mx.array:
    """How often each token is in each list, shape (lists, n_vocab)."""
    counts = mx.zeros((len(lists), n_vocab))
    rows = [row for row, tokens in enumerate(lists) for _ in tokens]
    ids = [token for tokens in lists for token in tokens]
    if not ids:
        return counts
    return counts.at[mx.array(rows), mx.array(ids)].add(1.0)  # pyright: ignore[reportUnknownMemberType]


def _bias(sequences: Rows[MlxSequence], n_vocab: int) -> mx.array:
    """What is added to the logits, shape (rows, n_vocab)."""
    bias = mx.zeros((len(sequences), n_vocab))
    for row, sequence in enumerate(sequences):
        if sequence.sampling.logit_bias:
            ids = mx.array(list(sequence.sampling.logit_bias))
            bias[row, ids] = mx.array(list(sequence.sampling.logit_bias.values()), mx.float32)
        if sequence.forbidden:
            bias[row, mx.array(list(sequence.forbidden))] = -mx.inf
    return bias
