"""Backend sampling: llama.cpp keeps only the largest logits of a row, where it computed them.

So less travels from a GPU and less is read here. The token is still chosen here, from what is left and with the same
noise as from a whole row, and so it is the same token. Where equals of the least logit handed back may be missing, the
row is computed again and read whole. One difference is left: a whole row fails its request for any logit that is NaN,
and here one may stay behind, if it is not so in every row (such models are found when they are loaded) and a device
does not count it among the largest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from exo.worker.protocol.messages import SamplingParams
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import Context
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.sampling.candidates import Candidates, Ids, Row, largest, top_k
from exo.worker.runner_cuda.sampling.device_chains import Chains
from exo.worker.runner_cuda.sampling.sampler import Sampler, Turn, choose
from exo.worker.runner_cuda.scheduler import Chunk, Step
from exo.worker.runner_cuda.sequence import Sequence

SIZES = (64, 256)
"""Logits that may be handed back of a row. Few sizes, since a slot's next request mostly keeps its chain then."""
WORTH = 1.05
"""How many times as fast it has to make a step of all slots."""
_UNTIMED, _TIMED = 3, 7
"""Steps of a try; the first ones also build the graphs."""


@dataclass(frozen=True, slots=True)
class Best:
    """Some of a row's logits, in no order of ids. No other one of the row is larger than any of them."""

    ids: Ids
    logits: Row

    def choice(self, sampler: Sampler, position: int) -> int | Candidates | None:
        """The token at ``position``, or those to draw it from, just as the whole row gives them; None: they are open.

        They are known where the least one that matters is larger than the least of all. Raises NotFinite.
        """
        least = self.logits.min()
        order = self.ids.argsort()
        ids, logits = self.ids[order], self.logits[order]
        if sampler.forbidden:
            left = (ids[:, None] != sampler.forbidden).all(axis=1)
            ids, logits = ids[left], logits[left]
        if not ids.size:
            return None
        if sampler.is_greedy:
            return int(ids[logits.argmax()]) if least < largest(logits) else None
        kept = top_k(logits, min(sampler.params.top_k, ids.size))
        logits = logits[kept]
        return sampler.among(ids[kept], logits, position) if least < logits.min() else None


def needed(sequence: Sequence) -> int:
    """How many of the largest logits a sequence's choices surely need, without ties; 0: all, or some besides."""
    sampler, params = sequence.sampler, sequence.sampler.params
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    scored = sequence.logprobs is not None or sequence.prompt_logprobs is not None
    if penalised or scored or params.logit_bias or sequence.constraint is not None:
        return 0
    k = 1 if sampler.is_greedy else params.top_k
    return k + len(sampler.forbidden) + 1 if k else 0


@dataclass(slots=True)
class BackendSampling:
    """Which slots have a chain, and what the chains hand back. For the engine's thread."""

    chains: Chains
    sizes: tuple[int, ...] = ()
    """Of chains, ascending; none is larger than the vocabulary. None: all rows are handed back whole."""
    _attached: dict[int, int] = field(default_factory=dict[int, int])
    """Sizes by slot."""
    _whole: dict[int, Sequence] = field(default_factory=dict[int, Sequence])
    """By slot, whose rows are read whole for as long as it is there."""

    def prepare(self, step: Step) -> None:
        """Before the step's decode. A slot keeps its chain as long as that does for the sequences in it."""
        if not self.sizes:
            return
        for chunk in step.chunks:
            if not chunk.n_scored + chunk.n_sampled:
                continue
            slot = chunk.sequence.slot
            n = 0 if self._whole.get(slot) is chunk.sequence else needed(chunk.sequence)
            size = next((size for size in self.sizes if size >= n), 0) if n else 0
            if size > self._attached.get(slot, 0) or (not size and slot in self._attached):
                self.chains.attach(slot, size)
                self._attached[slot] = size
                if not size:
                    del self._attached[slot]

    def read(self, step: Step) -> dict[int, list[Best]]:
        """After the decode: by slot, the rows that tokens are chosen from and that were not handed back whole."""
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
        """From now on its rows are handed back whole."""
        self._whole[sequence.slot] = sequence

    def stop(self) -> None:
        """No slot has a chain."""
        for slot in self._attached:
            self.chains.attach(slot, 0)
        self._attached.clear()


def backend_sampling(
    context: Context, chains: Chains, options: CudaOptions, *, can_cut: bool, on_gpus: bool
) -> BackendSampling:
    """As the card asks, once that was tried with the context, which is warm and empty. Raises LoadError.

    ``on_gpus``: every layer is on a GPU, without which "auto" does not try it.
    """
    unused, wanted = BackendSampling(chains), options.backend_sampling
    if wanted == "off" or (wanted == "auto" and (not on_gpus or options.speculation != "off")):
        return unused
    used = BackendSampling(chains, tuple(size for size in SIZES if size <= context.n_vocab))
    obstacle = _obstacle(used, context, options, can_cut=can_cut)
    if obstacle is None:
        trial = _Trial(context, options.slots)
        seconds = trial.seconds(trial.read)
        if not np.isfinite(context.logits(trial.n_rows)).all():
            # A request fails where such a logit is anywhere in a row, and a chain may not hand it back.
            return unused
        if not trial.reduces(used):
            obstacle = "the device that computes the logits cannot find the largest of a row"
        elif wanted == "on" or seconds >= WORTH * trial.seconds(lambda: trial.read_largest(used)):
            return used
        used.stop()
    if obstacle is not None and wanted == "on":
        raise LoadError("model_misconfigured", f'model card, [cuda] backend_sampling: is "on", but {obstacle}')
    return unused


def _obstacle(used: BackendSampling, context: Context, options: CudaOptions, *, can_cut: bool) -> str | None:
    """Why there is none for this model."""
    if not context.generates:
        return "the model is an encoder, which chooses no tokens"
    if not can_cut:
        return "the model cannot take tokens back, as it must where a row has to be computed again"
    if options.split_mode == "tensor":
        return 'llama.cpp has none with split_mode "tensor"'
    if not used.sizes:
        return f"the vocabulary has only {context.n_vocab} tokens, and {SIZES[0]} are kept of each row"
    return None


class _Trial:
    """A step in which every slot gets a token, over and over."""

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
        """Attaches a chain to every slot; whether that has an effect on each."""
        sampling.prepare(self._step)
        self._decode()
        return all(sampling.chains.count(row, self.n_rows) == sampling.sizes[0] for row in range(self.n_rows))

    def read(self) -> None:
        """The tokens from whole rows."""
        choose([Turn(self._sampler, row, 1) for row in self._context.logits(self.n_rows)])

    def read_largest(self, sampling: BackendSampling) -> None:
        """The tokens from what was handed back."""
        found = (best.choice(self._sampler, 1) for rows in sampling.read(self._step).values() for best in rows)
        choose([each for each in found if isinstance(each, Candidates)])

    def seconds(self, read: Callable[[], None]) -> float:
        """Of a step."""
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
