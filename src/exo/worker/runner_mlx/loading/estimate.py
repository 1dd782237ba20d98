"""Estimates the memory of a model in this runner from its folder's headers and the model card. Loads no weights.

Weights and KV cache are counted exactly. The first pass allocates the whole cache. The rest is fitted to measurements
of runner processes (x86-64, mlx 0.32.4, Python 3.11), which ``tests/engines/test_estimate.py`` repeats.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import Estimated
from exo.worker.protocol.remote_host import HOST_RAM
from exo.worker.runner_common.memory_plan import (
    CACHE,
    LONGEST_TEXT,
    Open,
    Part,
    Plan,
    cells,
    completed,
    default_longest,
    estimated,
    most_cache_in_ram,
)
from exo.worker.runner_common.model_files.folder_config import Json, language_config
from exo.worker.runner_common.model_files.safetensors import SafetensorsTensor
from exo.worker.runner_mlx.loading.devices import device, use_backend
from exo.worker.runner_mlx.loading.loader import MlxChecked, check, computed_in
from exo.worker.runner_mlx.model import cached_elements
from exo.worker.runner_mlx.ranks.pipeline import own_layers
from exo.worker.runner_mlx.ranks.sharding import Sharding

_PROCESS = 102_000_000
"""Bytes of RAM for the interpreter and libraries."""
_WORKSPACE = 36_000_000
"""Bytes that MLX keeps after its largest pass over a prompt."""
_TOKENIZER = 17.5
"""Bytes of RAM for each byte of the tokenizer's file."""
_DEVICE_CONTEXT = 512 << 20
"""Bytes that CUDA takes for itself on a device."""
_OF_LAYER = re.compile(r"\blayers\.(\d+)\.")
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


def estimate(command: Estimate) -> Estimated:
    """Raises LoadError as loading would, for a missing or broken folder or wrong settings."""
    checked, table = check(command.load), command.load.table
    model = _MlxSizes.of(checked)
    n_ctx, slots = table.get("n_ctx") in (None, "auto"), table.get("slots") is None
    in_ram = checked.backend != "MlxCuda" and table.get("n_ctx") is None
    longest, because = default_longest(command.load.tasks, in_ram=in_ram)
    left = Open(
        n_ctx=n_ctx,
        slots=slots,
        trained=checked.trained,
        longest=longest if table.get("n_ctx") is None else None,
        longest_because=because,
        most_cache=most_cache_in_ram(sum(model.weights)) if in_ram and (n_ctx or slots) else None,
    )
    plan = Plan(left.lengths[0] if n_ctx else checked.n_ctx, checked.options.slots)
    found = estimated(plan, left, model.size)
    return found.model_copy(update={"notes": checked.folder.notes})


def with_choice(command: Load) -> Load:
    """Returns the command with context and slots that fit what is free, if its table leaves them open.

    A server that counts memory has put them there. Raises LoadError as loading would.
    """
    if all(isinstance(command.table.get(key), int) for key in ("n_ctx", "slots")):
        return command
    found = estimate(Estimate(load=command))
    backend = use_backend(command.backend)
    return completed(command, found, {} if backend == "MlxCpu" else {backend: device(backend).memory_total})


@dataclass(frozen=True, slots=True)
class _MlxSizes:
    checked: MlxChecked
    weights: tuple[int, ...]
    """Bytes of each rank, as they are computed with."""
    tokenizer: int
    """Bytes of its file."""
    cached: tuple[int, ...]
    """Elements of one token's keys and values in the layers, or shares of layers, of each rank."""
    width: int
    """Bytes of a number that is computed."""
    vocabulary: int

    @classmethod
    def of(cls, checked: MlxChecked) -> "_MlxSizes":
        """From what the folder's files say of themselves."""
        sizes = language_config(checked.folder.config)
        stored = checked.folder.tensors
        dtype = computed_in(checked.options, checked.folder.config, checked.backend)
        floats = Counter(tensor.dtype for tensor in stored.values() if tensor.dtype in _FLOATS)
        usual = next((name for name, _ in floats.most_common(1)), "F32")
        layers = _number(sizes, "num_hidden_layers", 1)
        file = checked.folder.path / "tokenizer.json"
        return cls(
            checked=checked,
            weights=_weights(stored, dtype, layers, checked.sharding),
            tokenizer=file.stat().st_size if file.exists() else 0,
            cached=_cached(cached_elements(checked.folder.config), layers, checked.sharding),
            width=_FLOATS[dtype or usual],
            vocabulary=_number(sizes, "vocab_size", 0),
        )

    def size(self, plan: Plan) -> list[Part]:
        """Returns the memory of each part for a plan, in all processes together."""
        longest = self.checked.options.embedding_ctx or min(plan.n_ctx, LONGEST_TEXT)
        tokens = [self.width * each for each in self.cached]
        ranks, peers = len(tokens), self.checked.peers
        context = _DEVICE_CONTEXT if self.checked.backend == "MlxCuda" else 0
        process = self._part("process", [context] * ranks)
        logits = 4 * plan.slots * self.vocabulary
        return [
            replace(process, host=process.host + _PROCESS * (1 if peers else ranks)),
            *(Part("process", devices={f"{peer}/{HOST_RAM}": _PROCESS}) for peer in peers),
            Part("tokenizer", int(self.tokenizer * _TOKENIZER)),
            self._part("weights", self.weights),
            *self._adapters(),
            self._part(CACHE, [plan.slots * cells(plan.n_ctx) * token for token in tokens]),
            self._part("compute", [_WORKSPACE + logits] * ranks, later=True),
            self._part("embedding", [cells(longest) * token for token in tokens], later=True),
        ]

    def _adapters(self) -> Sequence[Part]:
        """Returns the memory of adapters. Each matrix that one of them changes has room for all, and for none."""
        adapters = self.checked.adapters
        if not adapters:
            return ()
        pairs = {
            module: (each.tensors[a], each.tensors[b]) for each in adapters for module, (a, b) in each.pairs().items()
        }
        sides = sum(first.shape[1] + second.shape[0] for first, second in pairs.values())
        return (
            self._part("adapters", [self.width * (len(adapters) + 1) * max(each.rank for each in adapters) * sides]),
        )

    def _part(self, name: str, by_rank: Sequence[int], *, later: bool = False) -> Part:
        """Returns a part's memory. Each CUDA device or host has one rank; Metal's memory is RAM as well."""
        peers, on_cuda = self.checked.peers, self.checked.backend == "MlxCuda"
        here, others = sum(by_rank), dict[str, int]()
        if peers or on_cuda:
            here, *sizes = by_rank
            on_host = "CUDA0" if on_cuda else HOST_RAM
            names = [f"{peer}/{on_host}" for peer in peers] or [f"CUDA{rank + 1}" for rank in range(len(sizes))]
            others = dict(zip(names, sizes, strict=True))
        if on_cuda:
            return Part(name, 0, here, later, others)
        return Part(name, here, 0 if self.checked.backend == "MlxCpu" else here, later, others)


def _number(sizes: Json, key: str, default: int) -> int:
    value = sizes.get(key)
    return value if isinstance(value, int) else default


def _weights(
    stored: Mapping[str, SafetensorsTensor], dtype: str | None, layers: int, sharding: Sharding | None
) -> tuple[int, ...]:
    """Returns bytes of weights by rank.

    In a tensor-parallel model, every rank has the weights outside the layers and the layers' vectors; matrices of
    layers are divided. In a pipeline, the first stage, which is the last rank, also has the embedding, and rank 0 has
    all weights outside the layers.
    """
    if sharding is None:
        return (sum(_bytes(tensor, dtype) for tensor in stored.values()),)
    ranks = range(sharding.size)
    found = [0 for _ in ranks]
    for name, tensor in stored.items():
        size, place = _bytes(tensor, dtype), _OF_LAYER.search(name)
        for rank in ranks:
            if sharding.kind == "tensor":
                found[rank] += size // sharding.size if place is not None and len(tensor.shape) > 1 else size
            elif place is None:
                found[rank] += size if rank == 0 or (rank == ranks[-1] and "embed" in name) else 0
            elif int(place[1]) in own_layers(layers, rank, sharding.size):
                found[rank] += size
    return tuple(found)


def _cached(elements: Sequence[int], layers: int, sharding: Sharding | None) -> tuple[int, ...]:
    """Returns the elements of one token's keys and values by rank. ``elements`` has them by layer."""
    if sharding is None:
        return (sum(elements),)
    ranks = range(sharding.size)
    if sharding.kind == "tensor":
        return tuple(sum(elements) // sharding.size for _ in ranks)
    parts = (own_layers(layers, rank, sharding.size) for rank in ranks)
    return tuple(sum(elements[part.start : part.stop]) for part in parts)


def _bytes(tensor: SafetensorsTensor, dtype: str | None) -> int:
    """Returns a tensor's bytes in memory. Floating-point weights are converted to ``dtype``; quantised ones are not."""
    if dtype is None or tensor.dtype not in _FLOATS:
        return tensor.size
    return math.prod(tensor.shape) * _FLOATS[dtype]
