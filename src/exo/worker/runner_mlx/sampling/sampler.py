"""Chooses the tokens of a step on the device, with the semantics of ``messages.SamplingParams``.

Rows that need the same kind of computation are computed together, with their parameters as columns of arrays. All of it
is queued behind the forward pass, so the device does not wait for the host.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from exo.worker.runner_common.keyed_rng import BLOCK, gumbels
from exo.worker.runner_mlx.sequence import MlxSequence

FAILED = -1
"""Replaces the token of a row whose largest logit is NaN or infinite: the computation went wrong there."""

EXCLUDED = -1e30
"""Added to the logits of tokens that a request does not allow. It is finite, so one that must come still can."""

SUM_BLOCK = 64
"""Probabilities are summed in blocks of blocks, because float32's rounding error grows with the terms of one sum."""

SMALLEST = 1e-30
"""A lower bound of temperatures and weights that is not 0 in float32."""


class Kind(NamedTuple):
    """The computations that a row needs. Rows of one kind are computed together."""

    penalised: bool
    biased: bool
    ending: bool
    """Whether some tokens are not chosen before a position."""
    greedy: bool
    top_k: int
    """0 for all tokens. It is part of the kind because it is the width of an array."""
    min_p: bool
    top_p: bool


def kind_of(sequence: MlxSequence, n_vocab: int) -> Kind:
    """Returns the kind of a sequence. For a greedy one, the parameters of drawing do not count."""
    params = sequence.sampling
    greedy = params.temperature == 0
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return Kind(
        penalised=penalised,
        biased=bool(params.logit_bias or params.allowed),
        ending=len(sequence.tokens) < sequence.ends_at,
        greedy=greedy,
        top_k=0 if greedy or params.top_k >= n_vocab else params.top_k,
        min_p=not greedy and params.min_p > 0,
        top_p=not greedy and params.top_p < 1,
    )


class MlxSampler:
    """Samples for a fixed list of sequences, one per row. A step with other sequences needs a new sampler."""

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
        """Returns the tokens at ``positions``, shape (rows,), int32, from logits of shape (rows, vocabulary).

        ``allowed``, of the logits' shape, is false for tokens that a grammar excludes.
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
        if kind.ending:
            self._ends = _count([sequence.ends for sequence in sequences], n_vocab) > 0
            self._ends_at = [sequence.ends_at for sequence in sequences]
        if not kind.greedy:
            self._temperature = _column(max(params.temperature, SMALLEST) for params in self._params)
            self._min_p = _column(params.min_p for params in self._params)
            self._top_p = _column(params.top_p for params in self._params)

    def choose(self, logits: mx.array, positions: Rows[int]) -> mx.array:
        """Does the same as ``MlxSampler.choose`` for these rows."""
        logits = logits.astype(mx.float32)
        if self._kind.penalised:
            logits = self._penalise(logits, positions)
        if self._kind.biased:
            logits = logits + self._bias
        if self._kind.ending:
            early = [position < end for position, end in zip(positions, self._ends_at, strict=True)]
            logits = mx.where(mx.array(early)[:, None] & self._ends, -mx.inf, logits)
        top = logits.max(axis=-1, keepdims=True)
        if self._kind.greedy:
            token = logits.argmax(axis=-1)
        else:
            weights = self._keep(logits, top)
            token = _draw(weights, _noise(self._seeds, positions, weights.shape[1]))
        token = mx.where(mx.abs(top[:, 0]) < mx.inf, token.astype(mx.int32), FAILED)
        if self._kind.penalised:
            self._accept(token, positions)
        return token

    # --- penalties ---

    def _start_history(self, sequences: Rows[MlxSequence], n_vocab: int, unread: mx.array | None) -> None:
        """Counts each token in the output, and notes where each one was last, shape (rows, vocabulary)."""
        self._counts = _count([sequence.tokens[sequence.n_prompt :] for sequence in sequences], n_vocab)
        last = np.full((len(sequences), n_vocab), -1, np.int32)
        for row, sequence in zip(last, sequences, strict=True):
            row[sequence.tokens] = np.arange(len(sequence.tokens))
        self._last = mx.array(last)
        self._ids = mx.arange(n_vocab)
        self._repetition = _column(params.repetition_penalty for params in self._params)
        self._presence = _column(params.presence_penalty for params in self._params)
        self._frequency = _column(params.frequency_penalty for params in self._params)
        if unread is not None:
            self._accept(unread, [len(sequence.tokens) for sequence in sequences])

    def _penalise(self, logits: mx.array, positions: Rows[int]) -> mx.array:
        harder = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
        windows = [params.repetition_window for params in self._params]
        begins = [max(at - window, 0) if window else 0 for at, window in zip(positions, windows, strict=True)]
        logits = mx.where(self._last >= mx.array(begins)[:, None], harder, logits)
        return logits - mx.where(self._counts > 0, self._presence + self._frequency * self._counts, 0.0)

    def _accept(self, tokens: mx.array, positions: Rows[int]) -> None:
        new = self._ids == tokens[:, None]
        self._counts = self._counts + new
        self._last = mx.where(new, mx.array(list(positions))[:, None], self._last)

    # --- candidates ---

    def _keep(self, logits: mx.array, top: mx.array) -> mx.array:
        """Returns weights, shape (rows, vocabulary): probabilities divided by the row's largest one.

        They are zero for tokens that top-k, min-p or top-p exclude.
        """
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
    """Draws a token for each row: first a block of ids, then a token in it. See ``SamplingParams``.

    ``weights`` have the shape (rows, vocabulary), ``noise`` the shape (rows, BLOCK + number of blocks).
    """
    blocks = mx.unflatten(mx.pad(weights, [(0, 0), (0, -weights.shape[1] % BLOCK)]), -1, (-1, BLOCK))
    block = (mx.log(blocks.sum(axis=-1)) + noise[:, BLOCK:]).argmax(axis=-1)
    inside = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + (mx.log(inside) + noise[:, :BLOCK]).argmax(axis=-1)


def _running_sums(weights: mx.array) -> mx.array:
    """Returns the running sums along each row."""
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
    """Returns noise of shape (rows, BLOCK + blocks of the vocabulary), float32."""
    streams = np.arange(BLOCK + -(-n_vocab // BLOCK))
    return mx.array(np.stack([gumbels(*key, streams) for key in zip(seeds, positions, strict=True)]).astype(np.float32))


def _column(numbers: Iterable[float]) -> mx.array:
    """Returns an array of shape (rows, 1), float32."""
    return mx.array(list(numbers), mx.float32)[:, None]


def _count(lists: Rows[Rows[int]], n_vocab: int) -> mx.array:
    """Returns the count of each token in each list, shape (lists, n_vocab)."""
    counts = mx.zeros((len(lists), n_vocab))
    rows = [row for row, tokens in enumerate(lists) for _ in tokens]
    ids = [token for tokens in lists for token in tokens]
    if not ids:
        return counts
    return counts.at[mx.array(rows), mx.array(ids)].add(1.0)  # pyright: ignore[reportUnknownMemberType]


def _bias(sequences: Rows[MlxSequence], n_vocab: int) -> mx.array:
    """Returns the bias of the logits, shape (rows, n_vocab)."""
    bias = mx.zeros((len(sequences), n_vocab))
    for row, sequence in enumerate(sequences):
        if sequence.sampling.logit_bias:
            ids = mx.array(list(sequence.sampling.logit_bias))
            bias[row, ids] = mx.array(list(sequence.sampling.logit_bias.values()), mx.float32)
        if allowed := sequence.sampling.allowed:
            excluded = mx.full((n_vocab,), EXCLUDED)
            excluded[mx.array(allowed)] = 0.0
            bias[row] += excluded
    return bias
