"""Chooses the tokens of a step with the semantics of ``messages.SamplingParams``, as one of vLLM's logits processors.

vLLM samples greedily. It first calls this processor with the logits of all rows, which draws the token of each row that
is not greedy and excludes all others. A seed, a penalty and a grammar thus mean the same as in every runner.

If several processes share a model, this runs in the one with the last layers. ``Choice`` comes with the request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from exo.worker.runner_common.grammar.guided_decoding import GrammarError
from exo.worker.runner_common.keyed_rng import BLOCK, gumbels
from exo.worker.runner_vllm.sequence import Choice

# Neither package is in the environment that checks types, so plain imports would not type-check.
torch = import_module("torch")
interface = import_module("vllm.v1.sample.logits_processor.interface")

Tensor = Any
"""A torch.Tensor."""

CHOICE = "exo_choice"
"""The key of a request's ``Choice`` in vLLM's extra arguments."""

EXCLUDED = -1e30
"""Added to the logits of tokens that a request does not allow. It is finite, so one that must come still can."""

SMALLEST = 1e-30
"""A lower bound of temperatures that is not 0 in float32."""


@dataclass(slots=True)
class BatchRow:
    """One row of vLLM's batch. ``prompt`` and ``output`` are vLLM's own lists, which it keeps up to date.

    The tensors are created when first needed.
    """

    choice: Choice
    prompt: list[int]
    output: list[int]
    counts: Tensor = None
    """The count of each token in the output, shape (vocabulary,), float32."""
    seen: Tensor = None
    """Whether each token is in prompt or output, shape (vocabulary,), bool."""
    n_seen: int = 0
    """The number of tokens included in ``counts`` and ``seen``."""
    bias: Tensor = None
    """The bias of the logits, shape (vocabulary,), float32."""

    @property
    def position(self) -> int:
        """The position of the token to be chosen."""
        return len(self.prompt) + len(self.output)


class _Params(Protocol):
    """vLLM's sampling parameters, which carry the request's ``Choice``."""

    extra_args: Mapping[str, Choice] | None


class _Changes(Protocol):
    """vLLM's changes to the rows of its batch, by index."""

    removed: Sequence[int]
    added: Sequence[tuple[int, _Params, list[int] | None, list[int]]]
    moved: Sequence[tuple[int, int, object]]


@final
class Chooser(interface.LogitsProcessor):
    """The logits processor. vLLM creates one, by this name, in each process that samples."""

    def __init__(self, vllm_config: object, device: object, is_pin_memory: bool) -> None:
        """Takes the arguments that vLLM passes."""
        self._device = device
        self._rows: dict[int, BatchRow] = {}

    def is_argmax_invariant(self) -> bool:
        """False, because this processor chooses the tokens."""
        return False

    def update_state(self, batch_update: _Changes | None) -> None:
        """Applies vLLM's changes of rows, in the prescribed order: removed, added, moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._rows.pop(index, None)
            if params.extra_args is not None:
                self._rows[index] = BatchRow(params.extra_args[CHOICE], prompt or [], output)
        for source, target, direction in batch_update.moved:
            row, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if row is not None:
                self._rows[target] = row
            if other is not None and direction is interface.MoveDirectionality.SWAP:
                self._rows[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Changes logits of shape (rows, vocabulary), float32, in place.

        A row whose largest logit is NaN or infinite becomes NaN, which vLLM counts and reports.
        """
        rows = {index: row for index, row in self._rows.items() if index < logits.shape[0]}
        broken = ~torch.isfinite(logits.amax(dim=-1))
        drawn: list[int] = []
        for index, row in rows.items():
            if row.choice.alters:
                self._alter(logits[index], row)
            if row.choice.sampling.temperature > 0 and not row.choice.matched:
                drawn.append(index)
        if drawn:
            at = torch.tensor(drawn, device=logits.device)
            tokens = draw(logits[at], [rows[index] for index in drawn])
            logits[at] = -torch.inf
            logits[at, tokens] = 0.0
        logits.masked_fill_(broken[:, None], torch.nan)
        return logits

    def _alter(self, logits: Tensor, row: BatchRow) -> None:
        """Applies steps 0 to 2 of ``SamplingParams`` to one row, shape (vocabulary,), in place."""
        choice = row.choice
        if choice.restricted and not self._mask(logits, row):
            return
        if choice.penalised:
            self._penalise(logits, row)
        if choice.biased:
            if row.bias is None:
                row.bias = _bias(choice, logits)
            logits += row.bias
        if row.position < choice.ends_at:
            logits[list(choice.ends)] = -torch.inf

    def _mask(self, logits: Tensor, row: BatchRow) -> bool:
        """Excludes the tokens that the constraint forbids. If it allows none, returns false and changes nothing."""
        choice = row.choice
        assert choice.constraint is not None
        try:
            allowed = choice.constraint.mask().copy()
        except GrammarError as error:
            choice.wrong = str(error)
            return False
        if row.position < choice.ends_at:
            allowed[list(choice.ends)] = False
        choice.matched = not allowed.any()
        if not choice.matched:
            logits.masked_fill_(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
        return not choice.matched

    def _penalise(self, logits: Tensor, row: BatchRow) -> None:
        sampling = row.choice.sampling
        _count(row, logits)
        harder = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        penalty = sampling.presence_penalty + sampling.frequency_penalty * row.counts
        logits.copy_(torch.where(_counted(row), harder, logits))
        logits -= torch.where(row.counts > 0, penalty, 0.0)


def _count(row: BatchRow, logits: Tensor) -> None:
    """Adds the tokens that are new since the last call to ``counts`` and ``seen``."""
    if row.counts is None:
        row.counts = torch.zeros_like(logits)
        row.seen = torch.zeros_like(logits, dtype=torch.bool)
    n_prompt = len(row.prompt)
    before, after = row.prompt[row.n_seen :], row.output[max(0, row.n_seen - n_prompt) :]
    new = before + after
    generated = new[max(0, row.choice.n_prompt - row.n_seen) :]
    row.n_seen += len(new)
    if new:
        row.seen[torch.tensor(new, device=logits.device)] = True
    if generated:
        ids = torch.tensor(generated, device=logits.device)
        row.counts.index_add_(0, ids, torch.ones(len(generated), device=logits.device))


def _counted(row: BatchRow) -> Tensor:
    """Returns whether the repetition penalty counts each token, shape (vocabulary,)."""
    if not (window := row.choice.sampling.repetition_window):
        return row.seen
    before = window - len(row.output)
    recent = [*(row.prompt[-before:] if before > 0 else ()), *row.output[-window:]]
    counted = torch.zeros_like(row.seen)
    counted[torch.tensor(recent, device=counted.device)] = True
    return counted


def _bias(choice: Choice, logits: Tensor) -> Tensor:
    bias = np.zeros(logits.shape[0], np.float32)
    for token, value in choice.sampling.logit_bias.items():
        bias[token] = value
    if allowed := choice.sampling.allowed:
        excluded = np.full(bias.shape, EXCLUDED, np.float32)
        excluded[list(allowed)] = 0.0
        bias += excluded
    return torch.from_numpy(bias).to(logits.device)


def draw(logits: Tensor, rows: list[BatchRow]) -> Tensor:
    """Applies steps 3 to 5 to logits of shape (rows, vocabulary). Returns the tokens, shape (rows,)."""
    weights = _keep(logits, rows)
    n_vocab = int(logits.shape[1])
    streams: npt.NDArray[np.int64] = np.arange(BLOCK + -(-n_vocab // BLOCK))
    noise = np.stack([gumbels(row.choice.sampling.seed, row.position, streams) for row in rows]).astype(np.float32)
    found = torch.from_numpy(noise).to(logits.device)
    padded = torch.nn.functional.pad(weights, (0, -n_vocab % BLOCK))
    blocks = padded.view(len(rows), -1, BLOCK)
    block = (torch.log(blocks.sum(dim=-1)) + found[:, BLOCK:]).argmax(dim=-1)
    inside = blocks[torch.arange(len(rows), device=logits.device), block]
    return block * BLOCK + (torch.log(inside) + found[:, :BLOCK]).argmax(dim=-1)


def _keep(logits: Tensor, rows: list[BatchRow]) -> Tensor:
    """Returns weights, shape (rows, vocabulary): probabilities divided by the row's largest one.

    They are zero for tokens that top-k, min-p or top-p exclude.
    """
    sampling = [row.choice.sampling for row in rows]
    temperature = _column([max(params.temperature, SMALLEST) for params in sampling], logits)
    min_p = _column([params.min_p for params in sampling], logits)
    weights = torch.exp((logits - logits.amax(dim=-1, keepdim=True)) / temperature)
    weights = torch.where(weights >= min_p, weights, 0.0)
    n_vocab = logits.shape[1]
    cut = [at for at, params in enumerate(sampling) if 0 < params.top_k < n_vocab or params.top_p < 1]
    if cut:
        at = torch.tensor(cut, device=logits.device)
        top_k = [sampling[place].top_k or n_vocab for place in cut]
        top_p = [sampling[place].top_p for place in cut]
        weights[at] = _cut(logits[at], weights[at], top_k, top_p)
    return weights


def _cut(logits: Tensor, weights: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """Applies top-k, which keeps equals of the last token, and then top-p.

    Top-p keeps the smallest set of heaviest tokens whose sum reaches that share. Among equals at the border, the
    lowest ids are kept, because the sort is stable.
    """
    n_vocab = logits.shape[1]
    largest, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    last = torch.tensor([min(k, n_vocab) - 1 for k in top_k], device=logits.device)[:, None]
    heaviest = torch.where(largest >= largest.gather(1, last), weights.gather(1, order), 0.0)
    running = heaviest.double().cumsum(dim=-1)
    share = torch.tensor([p if p < 1 else torch.inf for p in top_p], device=logits.device, dtype=torch.float64)
    before = running - heaviest.double()
    kept = torch.where(before < share[:, None] * running[:, -1:], heaviest, 0.0)
    return torch.zeros_like(weights).scatter_(1, order, kept)


def _column(numbers: list[float], logits: Tensor) -> Tensor:
    """Returns a tensor of shape (rows, 1), float32."""
    return torch.tensor(numbers, device=logits.device, dtype=torch.float32)[:, None]
