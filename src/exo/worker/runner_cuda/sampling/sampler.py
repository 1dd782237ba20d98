"""Chooses tokens from views of the logits, with the semantics of ``messages.SamplingParams``.

Only sampling without top-k and min-p computes the exponentials of a whole row, which is slow with a large vocabulary.
All rows of a step are sampled together.
"""

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.keyed_rng import BLOCK, gumbels, key
from exo.worker.runner_common.sequence import Scores
from exo.worker.runner_cuda.sampling.candidates import (
    Candidates,
    Ids,
    Mask,
    NotFinite,
    Row,
    Weights,
    draw,
    largest,
    top_k,
)

_EXCLUDED = -1e30
"""Added to the logits of tokens that a request does not allow. It is finite, so one that must come still can."""
_COLDEST = 1e-30
"""Replaces temperatures whose inverse is infinite in float32. The largest logit wins either way."""


@dataclass(slots=True)
class Sampler:
    """The sampling state of one sequence. ``seen`` and ``counts`` are kept only if a penalty needs them."""

    params: SamplingParams
    ends: Sequence[int] = ()
    """Token ids that are not chosen before position ``ends_at``."""
    ends_at: int = 0
    seen: set[int] | deque[int] = field(init=False)
    """The distinct tokens of prompt and output, or the last tokens, as many as ``repetition_window``."""
    counts: dict[int, int] = field(default_factory=dict[int, int])
    """Occurrences in the output."""
    _bias_ids: Ids = field(init=False)
    _bias: Row = field(init=False)
    _excluded: Row | None = None
    """The bias of tokens that are not allowed, shape (n_vocab,); made with the first row."""

    def __post_init__(self) -> None:
        self.seen = deque[int](maxlen=window) if (window := self.params.repetition_window) else set[int]()
        self._bias_ids = np.fromiter(self.params.logit_bias.keys(), np.intp)
        self._bias = np.fromiter(self.params.logit_bias.values(), np.float32)

    def accept_prompt(self, tokens: Collection[int]) -> None:
        """Remembers the prompt for the repetition penalty."""
        if self.params.repetition_penalty == 1.0:
            return
        if isinstance(self.seen, deque):
            self.seen.extend(tokens)
        else:
            self.seen.update(tokens)

    def accept(self, token: int) -> None:
        """Remembers an output token for the penalties."""
        self.accept_prompt((token,))
        if self.params.presence_penalty or self.params.frequency_penalty:
            self.counts[token] = self.counts.get(token, 0) + 1

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit wins.

        If the grammar allows that token, it is also the choice under the grammar's mask. No other kind of choice is
        known without the mask, which changes the candidates and the sums of blocks.
        """
        return self.params.temperature == 0

    def choose(self, row: Row, position: int, allowed: Mask | None = None) -> int:
        """Returns the token at ``position``. ``row`` has its logits, shape (n_vocab,), and is changed in place.

        ``allowed``, of the same shape, is false for tokens that the grammar excludes. Raises NotFinite.
        """
        self.adjust(row, position)
        [token] = choose([Turn(self, row, position, allowed)])
        if token is None:
            raise NotFinite
        return token

    def among(self, ids: Ids, logits: Row, position: int) -> Candidates:
        """Returns the candidates at ``position``. ``ids`` ascend; ``logits`` are adjusted."""
        params = self.params
        temperature = max(params.temperature, _COLDEST)
        return Candidates(ids, logits, temperature, params.min_p, params.top_p, key(params.seed, position))

    def forbidden(self, position: int) -> Sequence[int]:
        """Returns the token ids that are not chosen at ``position``."""
        return self.ends if position < self.ends_at else ()

    def adjust(self, row: Row, position: int) -> None:
        """Applies penalties, biases and ``forbidden`` to the row in place."""
        params = self.params
        if self.seen:
            ids = np.fromiter(self.seen, np.intp)
            found = row[ids]
            row[ids] = np.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
        if self.counts:
            ids = np.fromiter(self.counts.keys(), np.intp)
            times = np.fromiter(self.counts.values(), np.float32)
            row[ids] -= params.presence_penalty + params.frequency_penalty * times
        if self._bias_ids.size:
            row[self._bias_ids] += self._bias
        if params.allowed:
            if self._excluded is None:
                self._excluded = np.full(row.shape, _EXCLUDED, np.float32)
                self._excluded[list(params.allowed)] = 0.0
            row += self._excluded
        if forbidden := self.forbidden(position):
            row[list(forbidden)] = -np.inf


@dataclass(slots=True)
class Turn:
    """A token to be chosen from one row of adjusted logits, shape (n_vocab,)."""

    sampler: Sampler
    row: Row
    position: int
    allowed: Mask | None = None
    """False for tokens that the grammar excludes."""


def choose(turns: Sequence[Turn | Candidates]) -> list[int | None]:
    """Returns the tokens of one step; None for a row whose largest logit is NaN or infinite.

    A token does not depend on the other rows. The rows are changed in place.
    """
    tokens: list[int | None] = [None] * len(turns)
    drawn: dict[int, Candidates] = {}
    for at, turn in enumerate(turns):
        if isinstance(turn, Candidates):
            drawn[at] = turn
            continue
        if turn.allowed is not None:
            np.copyto(turn.row, -np.inf, where=~turn.allowed)
        with suppress(NotFinite):
            if turn.sampler.is_greedy:
                tokens[at] = _greedy(turn.row)
            elif (candidates := _candidates(turn)) is not None:
                drawn[at] = candidates
            else:
                tokens[at] = _draw_from_all(turn)
    if drawn:
        for at, token in zip(drawn, draw(list(drawn.values())), strict=True):
            tokens[at] = token
    return tokens


def score(row: Row, token: int, n_top: int) -> Scores:
    """Returns the log-softmax of ``token`` and of the ``n_top`` most probable tokens. Raises NotFinite.

    ``row`` has the unadjusted logits, shape (n_vocab,).
    """
    peak = largest(row)
    normaliser = float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
    best = top_k(row, min(n_top, row.size)) if n_top else np.empty(0, np.intp)
    best = best[np.argsort(-row[best], kind="stable")][:n_top]
    top = [(int(each), float(row[each]) - normaliser) for each in best]
    return Scores(float(row[token]) - normaliser, top)


def _greedy(row: Row) -> int:
    token = int(row.argmax())
    if not np.isfinite(row[token]):
        raise NotFinite
    return token


def _candidates(turn: Turn) -> Candidates | None:
    """Returns the candidates, or None if every token of the row is one. Raises NotFinite."""
    row, params = turn.row, turn.sampler.params
    temperature, top_p = max(params.temperature, _COLDEST), params.top_p
    if 0 < params.top_k < row.size:
        ids = top_k(row, params.top_k)
    elif params.min_p > 0:
        # A weight reaches min_p exactly if the logit reaches top + T ln(min_p). The slack keeps tokens that rounding
        # would drop and the exact comparison in ``draw`` keeps.
        ids = np.flatnonzero(row >= largest(row) + temperature * np.log(params.min_p) - 1e-3)
    elif top_p < 1:
        ids, top_p = _top_p(_weights(row, temperature), top_p), 1.0
    else:
        return None
    return Candidates(ids, row[ids], temperature, params.min_p, top_p, key(params.seed, turn.position))


def _weights(row: Row, temperature: float) -> Row:
    """Returns probabilities divided by the largest one. Raises NotFinite."""
    weights = row - largest(row)
    weights *= np.float32(1.0 / temperature)
    return np.exp(weights, out=weights)


def _top_p(weights: Row, top_p: float) -> Ids:
    """Returns the ids, ascending, of the smallest set of heaviest tokens whose share reaches ``top_p``.

    Among equally heavy tokens, the set takes the lowest ids. The heaviest weight is 1. If the tokens above a floor
    together reach the share, they contain the set, so only they are sorted. With a language model the first floor
    nearly always suffices.
    """
    target = top_p * float(weights.sum(dtype=np.float64))
    near = np.empty(0, np.intp)
    for floor in (1e-2, 1e-4, 1e-6, 0.0):
        near = np.flatnonzero(weights >= floor)
        if weights[near].sum(dtype=np.float64) >= target:
            break
    order = near[np.argsort(-weights[near], kind="stable")]
    reached = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: int(reached.searchsorted(target)) + 1])


def _draw_from_all(turn: Turn) -> int:
    """Draws a block of ids, then a token in it. Raises NotFinite."""
    params, position = turn.sampler.params, turn.position
    weights = _weights(turn.row, max(params.temperature, _COLDEST))
    whole = weights.size // BLOCK
    sums = weights[: whole * BLOCK].reshape(whole, BLOCK).sum(axis=1, dtype=np.float64)
    if weights.size > whole * BLOCK:
        sums = np.append(sums, weights[whole * BLOCK :].sum(dtype=np.float64))
    block = _winner(sums, gumbels(params.seed, position, BLOCK + np.arange(sums.size)))
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    return block * BLOCK + _winner(inside, gumbels(params.seed, position, np.arange(inside.size)))


def _winner(weights: Weights | Row, noise: Weights) -> int:
    """Returns the index of the largest ln(weight) + noise."""
    with np.errstate(divide="ignore"):
        return int((np.log(weights) + noise).argmax())
