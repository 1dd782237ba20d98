"""Backend sampling: the device that computes the logits returns only the largest ones of each row.

Less data is copied from a GPU and read here. The token is still chosen here, with the same noise as from a whole row,
so it is the same token. If equals of the least returned logit might be missing, the row is computed again and read
whole.

Known gap: a NaN fails the request if the whole row is read, but goes unnoticed here if the device does not count it
among the largest logits. A model that has one in every row is detected when it is loaded.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
"""The speed-up of a step of all slots that makes backend sampling worth using."""
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


@dataclass(slots=True)
class BackendSampling:
    """Attaches chains to slots, and reads their results. Used by the engine's thread."""

    chains: Chains
    sizes: tuple[int, ...] = ()
    """The sizes of chains, ascending, at most the vocabulary's. If empty, all rows are read whole."""
    _attached: dict[int, int] = field(default_factory=dict[int, int])  # the chain's size, by slot
    _whole: dict[int, Sequence] = field(default_factory=dict[int, Sequence])  # sequences read whole, by slot

    def prepare(self, step: Step) -> None:
        """Attaches chains before the step's decode. A slot keeps its chain while that is large enough."""
        if not self.sizes:
            return
        for chunk in step.chunks:
            if not chunk.n_scored + chunk.n_sampled:
                continue
            slot = chunk.sequence.slot
            n = 0 if self._whole.get(slot) is chunk.sequence else needed(chunk.sequence, chunk.n_sampled)
            size = next((size for size in self.sizes if size >= n), 0) if n else 0
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
        trial = _SamplingTrial(context, options.slots)
        seconds = trial.seconds(trial.read)
        if not np.isfinite(context.logits(trial.n_rows)).all():
            # Such a logit must fail the request, and a chain may not return it.
            return unused
        if not trial.reduces(used):
            obstacle = "the device that computes the logits cannot select the largest logits of a row"
        elif wanted == "on" or seconds >= WORTH * trial.seconds(lambda: trial.read_largest(used)):
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


class _SamplingTrial:
    """Repeats a step in which every slot gets a token."""

    def __init__(self, context: Context, n_slots: int) -> None:
        sampler = Sampler(SamplingParams(seed=0, temperature=0.8, top_k=40, top_p=0.95))
        self.n_rows = min(n_slots, len(context.batch.tokens))
        self._context = context
        self._sampler = sampler
        chunks = [Chunk(Sequence(str(n), [0], 1, 1, 2, sampler, slot=n), 0, 1) for n in range(self.n_rows)]
        self._step = Step(chunks, [], prefills=False)
        batch, n_rows = context.batch, self.n_rows
        batch.tokens[:n_rows] = batch.positions[:n_rows] = 0
        batch.slots[:n_rows] = range(n_rows)
        batch.outputs[:n_rows] = 1

    def reduces(self, sampling: BackendSampling) -> bool:
        """Attaches a chain to every slot. Returns whether each one has an effect."""
        sampling.prepare(self._step)
        self._decode()
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
            self._decode()
            read()
            taken.append(time.perf_counter() - began)
        return median(taken[_UNTIMED:])

    def _decode(self) -> None:
        self._context.decode(self.n_rows)
        for slot in range(self.n_rows):
            self._context.trim(slot, 0)
