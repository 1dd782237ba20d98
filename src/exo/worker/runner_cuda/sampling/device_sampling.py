"""Backend sampling: the device that computes the logits returns only the largest ones of each row.

Less data is copied from a GPU and read here. Whether that saves time depends on the number of rows, so with "auto" each
step decides. The token is still chosen here, with the same noise as from a whole row,
so it is the same token. If equals of the least returned logit might be missing, the row is computed again and read
whole.

Known gap: a NaN fails the request if the whole row is read, but goes unnoticed here if the device does not count it
among the largest logits. A model that has one in every row is detected when it is loaded.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from statistics import median

import numpy as np

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import Context
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.sampling.candidates import Candidates, Ids, Row, largest, top_k
from exo.worker.runner_cuda.sampling.device_chains import Chains
from exo.worker.runner_cuda.sampling.sampler import Sampler, Turn, choose
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.step import Chunk, Step

SIZES = (64, 256)
"""Numbers of logits that a chain may return. There are few, so that a slot's next request can mostly keep its chain."""
WORTH = 1.05
"""The speed-up of a step, with some number of rows, that makes backend sampling worth using."""
_UNTIMED, _TIMED = 3, 7
"""Steps of a trial. The untimed ones come first and also build the graphs."""


@dataclass(frozen=True, slots=True)
class Best:
    """A row's largest logits, in no particular order. No other logit of the row is larger than any of them."""

    ids: Ids
    logits: Row

    def choice(self, sampler: Sampler, position: int) -> int | Candidates | None:
        """Returns the token at ``position``, or its candidates, as the whole row would give them; None if unknown.

        They are known if every logit that matters is larger than the least one here, whose equals may be missing.
        Raises NotFinite.
        """
        least = self.logits.min()
        order = self.ids.argsort()
        ids, logits = self.ids[order], self.logits[order]
        if forbidden := sampler.forbidden(position):
            left = (ids[:, None] != forbidden).all(axis=1)
            ids, logits = ids[left], logits[left]
        if not ids.size:
            return None
        if sampler.is_greedy:
            return int(ids[logits.argmax()]) if least < largest(logits) else None
        kept = top_k(logits, min(sampler.params.top_k, ids.size))
        logits = logits[kept]
        return sampler.among(ids[kept], logits, position) if least < logits.min() else None


def needed(sequence: Sequence, tokens: int = 1) -> int:
    """Returns how many of the largest logits the next ``tokens`` tokens of a sequence need if there are no ties.

    0 if they need whole rows.
    """
    sampler, params = sequence.sampler, sequence.sampler.params
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    scored = sequence.logprobs is not None or sequence.prompt_logprobs is not None
    restricted = sequence.constraint is not None and sequence.constraint.restricts(tokens)
    if penalised or scored or params.logit_bias or params.allowed or restricted:
        return 0
    k = 1 if sampler.is_greedy else params.top_k
    return k + len(sampler.forbidden(len(sequence.tokens))) + 1 if k else 0


@dataclass(frozen=True, slots=True)
class Gains:
    """What chains save of a step, in seconds."""

    seconds: Mapping[int, float]
    """By the number of the step's rows that give logits, for the numbers that were tried. Some save nothing."""
    change: float
    """The seconds by which attaching or detaching chains prolongs the next step."""

    def of(self, n_rows: int) -> float:
        """Returns what a step saves, by the nearest number that was tried and is not larger."""
        tried = max((n for n in self.seconds if n <= n_rows), default=min(self.seconds))
        return self.seconds[tried]


@dataclass(slots=True)
class BackendSampling:
    """Attaches chains to slots, and reads their results. Used by the engine's thread."""

    chains: Chains
    sizes: tuple[int, ...] = ()
    """The sizes of chains, ascending, at most the vocabulary's. If empty, all rows are read whole."""
    gains: Gains | None = None
    """What decides whether a step has chains. If None, every step has them."""
    _active: bool = True
    _lost: float = 0.0  # seconds that recent steps would have saved in the other state
    _attached: dict[int, int] = field(default_factory=dict[int, int])  # the chain's size, by slot
    _whole: dict[int, Sequence] = field(default_factory=dict[int, Sequence])  # sequences read whole, by slot

    def prepare(self, step: Step) -> None:
        """Attaches chains before the step's decode. A slot keeps its chain while that is large enough."""
        if not self.sizes:
            return
        wanted = {chunk.sequence.slot: self._size(chunk) for chunk in step.chunks if chunk.n_scored + chunk.n_sampled}
        if self.gains is not None and wanted:
            self._choose(sum(chunk.n_scored + chunk.n_sampled for chunk in step.chunks), all(wanted.values()))
        for slot, size in wanted.items() if self._active else ():
            if size > self._attached.get(slot, 0) or (not size and slot in self._attached):
                self.chains.attach(slot, size)
                self._attached[slot] = size
                if not size:
                    del self._attached[slot]

    def read(self, step: Step) -> dict[int, list[Best]]:
        """Returns, after the decode, the rows of each slot that has a chain. Other rows must be read whole."""
        n_outputs = sum(chunk.n_scored + chunk.n_sampled for chunk in step.chunks)
        at, rows = 0, dict[int, range]()
        for chunk in step.chunks:
            end = at + chunk.n_scored + chunk.n_sampled
            if end > at and chunk.sequence.slot in self._attached:
                rows[chunk.sequence.slot] = range(at, end)
            at = end
        if not rows:
            return {}
        first = next(iter(rows.values())).start
        ids, logits = self.chains.largest(first, n_outputs)
        return {
            slot: [Best(ids[at - first, :size].astype(np.intp), logits[at - first, :size]) for at in places]
            for slot, places in rows.items()
            if (size := self._attached[slot])
        }

    def read_whole(self, sequence: Sequence) -> None:
        """Has the sequence's rows read whole from now on."""
        self._whole[sequence.slot] = sequence

    def _size(self, chunk: Chunk) -> int:
        """Returns the size of the chain for a sequence; 0 if its rows must be read whole."""
        n = 0 if self._whole.get(chunk.sequence.slot) is chunk.sequence else needed(chunk.sequence, chunk.n_sampled)
        return next((size for size in self.sizes if size >= n), 0) if n else 0

    def _choose(self, n_rows: int, reducible: bool) -> None:
        """Attaches or detaches the chains once steps like this one have lost as much time as the change takes.

        If one row must be read whole, llama.cpp copies all rows, so chains save nothing.
        """
        assert self.gains is not None
        gain = self.gains.of(n_rows) if reducible else 0.0
        loses = -gain if self._active else gain
        self._lost = max(0.0, self._lost + loses)
        if self._lost > self.gains.change:
            self._active, self._lost = not self._active, 0.0
            if not self._active:
                self.stop()

    def stop(self) -> None:
        """Detaches all chains."""
        for slot in self._attached:
            self.chains.attach(slot, 0)
        self._attached.clear()


def backend_sampling(
    context: Context, chains: Chains, options: CudaOptions, *, can_cut: bool, on_gpus: bool
) -> BackendSampling:
    """Tries backend sampling as the model card asks, and returns it, unused if it does not work or does not pay.

    The context must be warm and empty. With "auto", it is tried only if every layer is on a GPU (``on_gpus``). Raises
    LoadError if the card says "on" and it does not work.
    """
    unused, wanted = BackendSampling(chains), options.backend_sampling
    if wanted == "off" or (wanted == "auto" and (not on_gpus or options.speculation != "off")):
        return unused
    used = BackendSampling(chains, tuple(size for size in SIZES if size <= context.n_vocab))
    obstacle = _obstacle(used, context, options, can_cut=can_cut)
    if obstacle is None:
        trials = [_SamplingTrial(context, n_rows) for n_rows in _counts(min(options.slots, len(context.batch.tokens)))]
        whole = [trial.seconds(trial.read) for trial in trials] if wanted == "auto" else []
        trials[-1].decode()
        if not np.isfinite(context.logits(trials[-1].n_rows)).all():
            # Such a logit must fail the request, and a chain may not return it.
            return unused
        began = time.perf_counter()
        if not trials[-1].reduces(used):
            obstacle = "the device that computes the logits cannot select the largest logits of a row"
        elif wanted == "on":
            return used
        else:
            took = time.perf_counter() - began
            reduced = [trial.seconds(partial(trial.read_largest, used)) for trial in trials]
            if any(before >= WORTH * after for before, after in zip(whole, reduced, strict=True)):
                saved = {trial.n_rows: a - b for trial, a, b in zip(trials, whole, reduced, strict=True)}
                used.gains = Gains(saved, max(0.0, took - reduced[-1]))
                return used
        used.stop()
    if obstacle is not None and wanted == "on":
        raise LoadError("model_misconfigured", f'model card, [cuda] backend_sampling: is "on", but {obstacle}')
    return unused


def _obstacle(used: BackendSampling, context: Context, options: CudaOptions, *, can_cut: bool) -> str | None:
    """Returns why this model cannot use backend sampling; None if it can."""
    if not context.generates:
        return "the model is an encoder, which generates no tokens"
    if not can_cut:
        return "this model's cache cannot drop a sequence's last token, as it must to compute a row again"
    if options.split_mode == "tensor":
        return 'llama.cpp does not support it with split_mode "tensor"'
    if not used.sizes:
        return f"the vocabulary has only {context.n_vocab} tokens, fewer than the {SIZES[0]} that are kept of each row"
    return None


def _counts(n_slots: int) -> list[int]:
    """Returns the numbers of rows to try, in ascending order."""
    return [*takewhile(lambda count: count < n_slots, (4**power for power in range(4))), n_slots]


class _SamplingTrial:
    """Repeats a step in which the first ``n_rows`` slots get a token."""

    def __init__(self, context: Context, n_rows: int) -> None:
        sampler = Sampler(SamplingParams(seed=0, temperature=0.8, top_k=40, top_p=0.95))
        self.n_rows = n_rows
        self._context = context
        self._sampler = sampler
        chunks = [Chunk(Sequence(str(n), [0], 1, 1, 2, sampler, slot=n), 0, 1) for n in range(self.n_rows)]
        self._step = Step(chunks, [], prefills=False)

    def _fill(self) -> None:
        batch, n_rows = self._context.batch, self.n_rows
        batch.tokens[:n_rows] = batch.positions[:n_rows] = 0
        batch.slots[:n_rows] = range(n_rows)
        batch.outputs[:n_rows] = 1

    def reduces(self, sampling: BackendSampling) -> bool:
        """Attaches a chain to each of the slots. Returns whether each one has an effect."""
        sampling.prepare(self._step)
        self.decode()
        return all(sampling.chains.count(row, self.n_rows) == sampling.sizes[0] for row in range(self.n_rows))

    def read(self) -> None:
        """Chooses tokens from whole rows."""
        choose([Turn(self._sampler, row, 1) for row in self._context.logits(self.n_rows)])

    def read_largest(self, sampling: BackendSampling) -> None:
        """Chooses tokens from the largest logits."""
        found = (best.choice(self._sampler, 1) for rows in sampling.read(self._step).values() for best in rows)
        choose([each for each in found if isinstance(each, Candidates)])

    def seconds(self, read: Callable[[], None]) -> float:
        """Returns the median duration of a step, including ``read``."""
        taken: list[float] = []
        for _ in range(_UNTIMED + _TIMED):
            began = time.perf_counter()
            self.decode()
            read()
            taken.append(time.perf_counter() - began)
        return median(taken[_UNTIMED:])

    def decode(self) -> None:
        """Computes the step, and drops its cells."""
        self._fill()
        self._context.decode(self.n_rows)
        for slot in range(self.n_rows):
            self._context.trim(slot, 0)
