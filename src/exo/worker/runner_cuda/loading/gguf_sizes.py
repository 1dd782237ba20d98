"""The memory that each part of a GGUF model takes in this runner.

Weights and KV cache are counted exactly. The rest is fitted to measurements of runner processes (x86-64, llama.cpp
0.5.0-dev, Python 3.11), which ``tests/engines/test_estimate.py`` repeats.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from exo.worker.protocol.events import RAM, Layout
from exo.worker.protocol.remote_host import HOST_RAM
from exo.worker.runner_common.memory_plan import CACHE, LONGEST_TEXT, USABLE, Part, Plan, cells
from exo.worker.runner_common.model_files.gguf import TENSOR_TYPES, GgufHeader
from exo.worker.runner_cuda.bindings import CACHE_TYPES
from exo.worker.runner_cuda.embedding import LOGITS_BYTES, MOST_TEXTS
from exo.worker.runner_cuda.loading.heads import uses_head
from exo.worker.runner_cuda.loading.layer_cache import CachedLayer, layer_caches
from exo.worker.runner_cuda.loading.options import CudaOptions, chunks
from exo.worker.runner_cuda.loading.placement import Placement, is_expert, shared_out
from exo.worker.runner_cuda.prompt_cuts import SCORED_ROWS
from exo.worker.runner_cuda.speculation.head_drafter import WAITING

_PROCESS = 73_000_000
"""Bytes of RAM for the interpreter and libraries."""
_DRIVER = 350_000_000
"""Bytes of RAM that CUDA adds."""
DEVICE_CONTEXT = 512 << 20
"""Bytes that CUDA takes for itself on each device."""
_COPIES = 4
"""Copies of a graph's inputs if several devices form a pipeline (GGML_SCHED_MAX_COPIES)."""
_OUTPUT_COPIES = 4
"""The size of the output buffers with backend sampling, as a multiple of the logits."""
_CELL, _USED_CELL = 48, 120
"""Bytes of RAM by which llama.cpp and the loop know a cell of the KV cache, and those that a token in it adds."""
_TOKEN = 150
"""Bytes of RAM for each token of the vocabulary."""
_Where = Sequence[Mapping[str, float]]
"""See ``Placement.layers``."""
_OF_DRAFT = ("vocabulary", "weights", "KV cache", "outputs", "compute")


@dataclass(slots=True)
class _LayerSizes:
    """Sizes of one layer. Those of weights are in bytes."""

    cache: CachedLayer
    weights: int = 0
    experts: int = 0
    """The part of ``weights`` that ``cpu_moe`` keeps in RAM."""
    largest: int = 0
    """The largest tensor."""
    largest_expert: int = 0
    """The largest tensor of the experts."""
    copied: int = 0
    """The part of ``weights`` that is copied to each device if they share the layer."""
    adapters: int = 0


@dataclass(frozen=True, slots=True)
class GgufSizes:
    """Sizes of a model's parts. Those of weights are in bytes."""

    options: CudaOptions
    layers: list[_LayerSizes]
    embedding: int
    """The token embedding, which stays in RAM."""
    rest: int
    """The weights of the output."""
    tied: bool
    """Whether the output uses the embedding's matrix, which is then copied to a device."""
    vocabulary: int
    trained: int
    hidden: int
    wide: int
    """The elements of a token that a layer computes with: hidden ones, all heads' keys, or a recurrent layer's."""
    feed_forward: int
    """The elements of a token in a layer's feed-forward network, those of all its experts together."""
    heads: int
    adapters: int = 0
    """The adapters' tensors that belong to no layer."""
    head: CachedLayer | None = None
    """The cache of the head for multi-token prediction, if it is used."""
    copies: bool = False
    """Whether a device computes long steps with copies of the weights that are in RAM."""

    @classmethod
    def of(
        cls, headers: Sequence[GgufHeader], options: CudaOptions, adapters: Sequence[GgufHeader] = ()
    ) -> "GgufSizes":
        """Reads the sizes from the headers of a model's files. The first one has the metadata."""
        header, tensors = headers[0], [tensor for each in headers for tensor in each.tensors]
        arch = header.text("general.architecture")
        caches = layer_caches(header, equal_values=options.flash_attn == "off", rollback=options.rollback)
        layers = [_LayerSizes(each) for each in caches]
        head = uses_head(options, headers)
        n_loaded = len(layers) - (0 if head else header.integer(f"{arch}.nextn_predict_layers", 0))
        embedding = rest = 0
        of_adapters = [tensor for each in adapters for tensor in each.tensors]
        for tensor in of_adapters:
            if (layer := _layer(tensor.name, layers)) is not None:
                layer.adapters += tensor.size
        for tensor in tensors:
            if (layer := _layer(tensor.name, layers)) is not None:
                layer.weights += tensor.size
                layer.largest = max(layer.largest, tensor.size)
                layer.copied += 0 if shared_out(tensor.name) else tensor.size
                if is_expert(tensor.name):
                    layer.experts += tensor.size
                    layer.largest_expert = max(layer.largest_expert, tensor.size)
            elif tensor.name.startswith("token_embd."):
                embedding += tensor.size
            else:
                rest += tensor.size
        layers[n_loaded:] = [_LayerSizes(each.cache) for each in layers[n_loaded:]]
        hidden = header.integer(f"{arch}.embedding_length", 1)
        heads = max(header.per_layer(f"{arch}.attention.head_count", len(layers), 1))
        return cls(
            options=options,
            layers=layers,
            embedding=embedding,
            rest=rest,
            tied=not any(tensor.name == "output.weight" for tensor in tensors),
            vocabulary=header.array_length("tokenizer.ggml.tokens"),
            trained=header.integer(f"{arch}.context_length", USABLE),
            hidden=hidden,
            wide=_wide(header, arch, hidden, heads),
            feed_forward=_feed_forward(header, arch, len(layers), hidden),
            heads=heads,
            adapters=sum(each.size for each in of_adapters) - sum(each.adapters for each in layers),
            head=layer_caches(header, equal_values=options.flash_attn == "off", head=True)[-1] if head else None,
        )

    @property
    def weights(self) -> int:
        """The bytes of weights in RAM if all of them are there."""
        return self.embedding + self.rest + sum(each.weights for each in self.layers)

    @property
    def experts(self) -> tuple[int, ...]:
        """The values of ``cpu_moe`` that keep one layer's experts more in RAM than the one before."""
        return tuple(index + 1 for index, each in enumerate(self.layers) if each.experts)

    def layout(self, plan: Plan) -> Layout:
        """Returns where a plan puts the layers, the output counted as one, and what it makes of the context."""
        where = self._where(plan)
        places = [RAM if not shares else " and ".join(shares) for shares in where]
        kinds = (plan.cache_type,) * 2 if plan.cache_type else (self.options.cache_type_k, self.options.cache_type_v)
        return Layout(
            context_length=plan.n_ctx,
            slots=plan.slots,
            kv="pool" if plan.pool else "split",
            kv_type="/".join(dict.fromkeys(kinds)),
            layers={place: places.count(place) for place in dict.fromkeys(places)},
            experts_in_ram=sum(map(bool, self._experts_in_ram(plan, where))),
            batch=chunks(self.options, on_gpu=bool(plan.n_gpu_layers)).budget,
        )

    def size(self, plan: Plan) -> list[Part]:
        """Returns the memory of each part for a plan."""
        return self._parts(plan, chunks(self.options, on_gpu=bool(plan.n_gpu_layers)).alone)

    def balanced(self, plan: Plan) -> tuple[float, ...]:
        """Returns how many layers each device gets so that all are filled in the proportions of the plan.

        Layers whose experts are in RAM take much less than the others. Each layer goes on the device on whose part of
        all bytes its middle falls.
        """
        n_cells = self._n_cells(plan.n_ctx, chunks(self.options, on_gpu=True).alone)
        sizes = [
            layer.weights
            - (layer.experts if at < plan.cpu_moe else 0)
            + plan.parts * (count * self._token(layer.cache, plan) + layer.cache.state)
            for at, (layer, count) in enumerate(zip(self.layers, n_cells, strict=True))
        ]
        sizes.append(self.rest + (self.embedding if self.tied else 0))
        ends = [0, *accumulate(sizes[max(0, len(sizes) - (plan.n_gpu_layers or 0)) :])]
        parts = list(accumulate(plan.tensor_split or (1.0,) * len(plan.devices)))
        counts = [0] * len(parts)
        for start, end in pairwise(ends):
            counts[bisect_right(parts, parts[-1] * (start + end) / 2 / ends[-1])] += 1
        return tuple(counts)

    def beside(self, plan: Plan) -> list[Part]:
        """Returns the memory that this model adds as the draft model of the one that ``plan`` is for."""
        wanted = len(self.layers) + 1 if self.options.n_gpu_layers < 0 else self.options.n_gpu_layers
        own = replace(plan, n_gpu_layers=plan.n_gpu_layers and wanted, devices=plan.devices[:1], tensor_split=None)
        parts = self._parts(own, chunks(self.options, on_gpu=bool(plan.n_gpu_layers)).beside)
        return [replace(part, name="draft model") for part in parts if part.name in _OF_DRAFT]

    def _parts(self, plan: Plan, n_ubatch: int) -> list[Part]:
        """Returns the memory of each part for steps of up to ``n_ubatch`` rows in one graph."""
        on_gpu, where = plan.n_gpu_layers is not None, self._where(plan)
        row = 4 * self.vocabulary * (_OUTPUT_COPIES if self._may_reduce(where) else 1)
        return [
            Part("process", _PROCESS + (_DRIVER if on_gpu else 0), devices=_started(plan.devices)),
            Part("vocabulary", self.vocabulary * _TOKEN),
            self._weights(where, self._experts_in_ram(plan, where)),
            *self._adapters(where),
            self._cache(CACHE, plan, where, plan.parts, self._n_cells(plan.n_ctx, n_ubatch)),
            Part("cells", plan.parts * cells(plan.n_ctx) * _CELL),
            Part("cells", plan.parts * cells(plan.n_ctx) * _USED_CELL, later=True),
            Part("outputs", plan.slots * row),
            Part("prompt log-probabilities", SCORED_ROWS * row, later=True),
            Part("prefix cache", plan.prefix_cache_bytes, later=True),
            *self._compute(plan, where, n_ubatch),
            *self._texts(plan, where),
            *self._of_head(plan, where),
        ]

    def _where(self, plan: Plan) -> _Where:
        shares = plan.tensor_split or (1.0,) * len(plan.devices)
        placement = Placement(plan.devices, shares, by_tensor=self.options.split_mode == "tensor")
        return placement.layers(len(self.layers), plan.n_gpu_layers or 0)

    def _experts_in_ram(self, plan: Plan, where: _Where) -> list[int]:
        """Returns for each layer the bytes of its experts that are in RAM although the layer is on a device."""
        counts = zip(self.layers, where, strict=False)
        return [layer.experts if at < plan.cpu_moe and shares else 0 for at, (layer, shares) in enumerate(counts)]

    def _copied(self, plan: Plan, where: _Where) -> int:
        """Returns the bytes of the largest copy of a tensor in RAM, which the first device makes for a long step."""
        sizes = [0 if shares else layer.largest for layer, shares in zip(self.layers, where, strict=False)]
        experts = [layer.largest_expert for layer in self.layers[: plan.cpu_moe]]
        return max(*sizes, *experts, 0) if self.copies else 0

    def _weights(self, where: _Where, experts: Sequence[int]) -> Part:
        """Returns the memory of the weights. ``experts`` are bytes of each layer that are in RAM in any case."""
        *of_layers, behind = where
        host, devices = self.embedding + sum(experts), dict.fromkeys(_devices(where), 0)
        for layer, in_ram, shares in zip(self.layers, experts, of_layers, strict=True):
            host += 0 if shares else layer.weights
            for name, share in shares.items():
                devices[name] += math.ceil(share * (layer.weights - in_ram - layer.copied)) + layer.copied
        host += 0 if behind else self.rest
        for name, share in behind.items():
            devices[name] += math.ceil(share * self.rest) + (self.embedding if self.tied else 0)
        return Part("weights", host, devices=devices)

    def _adapters(self, where: _Where) -> Sequence[Part]:
        """Returns the memory of the adapters, each of whose tensors is beside the model's. Layers are never shared."""
        sizes = [*(layer.adapters for layer in self.layers), self.adapters]
        if not any(sizes):
            return ()
        host, devices = 0, dict.fromkeys(_devices(where), 0)
        for size, shares in zip(sizes, where, strict=True):
            host += 0 if shares else size
            for name in shares:
                devices[name] += size
        return (Part("adapters", host, devices=devices),)

    def _n_cells(self, n_ctx: int, n_ubatch: int, n_texts: int = 1) -> list[int]:
        """Returns the tokens that a sequence, or ``n_texts`` of them together, may have in each layer's cache."""
        if self.options.swa_full:
            return [cells(n_ctx)] * len(self.layers)
        return [layer.cache.n_cells(n_ctx, n_ubatch, n_texts) for layer in self.layers]

    def _cache(
        self, name: str, plan: Plan, where: _Where, slots: int, n_cells: Sequence[int], *, later: bool = False
    ) -> Part:
        """Returns the memory of the KV cache. Devices that share a layer have whole heads of it."""
        host, devices = 0, dict.fromkeys(_devices(where), 0)
        for layer, count, shares in zip(self.layers, n_cells, where, strict=False):
            cache = layer.cache
            size = slots * (count * self._token(cache, plan) + cache.state)
            host += 0 if shares else size
            for device, share in shares.items():
                whole = math.ceil(share * cache.heads) / cache.heads if cache.heads else share
                devices[device] += math.ceil(size * whole)
        return Part(name, host, later=later, devices=devices)

    def _token(self, cache: CachedLayer, plan: Plan) -> int:
        """Returns the bytes of one token in one layer's cache."""
        types = self.options.cache_type_k, self.options.cache_type_v
        kinds = (plan.cache_type, plan.cache_type) if plan.cache_type is not None else types
        return cache_bytes(kinds[0], cache.keys) + cache_bytes(kinds[1], cache.values)

    def _compute(self, plan: Plan, where: _Where, n_ubatch: int) -> list[Part]:
        """Returns the memory of the graph of a step, which a device allocates with the context."""
        n_outputs = (plan.slots + SCORED_ROWS) * (2 if self._may_reduce(where) else 1)
        n_cells = self._n_cells(plan.n_ctx, n_ubatch)
        return self._graph("compute", plan, where, n_ubatch, n_outputs, n_cells, later=False)

    def _may_reduce(self, where: _Where) -> bool:
        """Whether backend sampling may be used, whose graph has the logits twice."""
        wanted = self.options.backend_sampling
        return wanted == "on" or (wanted == "auto" and all(where) and self.options.split_mode != "tensor")

    def _graph(
        self,
        name: str,
        plan: Plan,
        where: _Where,
        rows: int,
        n_outputs: int,
        n_cells: Sequence[int],
        *,
        later: bool = True,
    ) -> list[Part]:
        """Returns the memory of a graph's buffers: the logits or one layer's activations, and the inputs.

        Only the devices with the output compute logits. Inputs are in RAM as well, where pages are taken when they are
        first used. ``later``: the devices' buffers are allocated by a request.
        """
        activations, logits = self._activations(rows), 4 * n_outputs * self.vocabulary
        devices = _devices(where)
        masks, scores = self._attention(rows, n_cells, [True] * len(self.layers))
        if not devices:
            return [Part(name, max(activations, logits) + masks + scores, later=True)]
        whole = all(where) and not any(self._experts_in_ram(plan, where))
        copies = _COPIES if len(devices) > 1 and whole and self.options.split_mode == "layer" else 1
        embedded = 4 * rows * self.hidden
        host = copies * (masks + embedded) + (0 if whole else activations) + (0 if all(where) else scores)
        sizes = dict[str, int]()
        for device in devices:
            *layers, ending = [device in shares for shares in where]
            masks, scores = self._attention(rows, n_cells, layers)
            computed = max(any(layers) * activations, ending * logits)
            sizes[device] = copies * (masks + embedded) + scores + computed
        sizes[next(iter(sizes))] += self._copied(plan, where)
        return [Part(name, host, later=True), Part(name, later=later, devices=sizes)]

    def _texts(self, plan: Plan, where: _Where) -> list[Part]:
        """Returns the memory of the context for embeddings; see ``runner_cuda/embedding.py``."""
        options = self.options
        chunk = chunks(options, on_gpu=bool(plan.n_gpu_layers)).beside
        longest = min(self.trained, options.embedding_ctx or min(plan.n_ctx, LONGEST_TEXT))
        rows = min(longest, chunk, max(32, LOGITS_BYTES // (4 * max(1, self.vocabulary))))
        alone = self.options.exact or any(layer.cache.state for layer in self.layers)
        n_texts = 1 if alone else min(MOST_TEXTS, rows)
        n_cells = self._n_cells(longest, rows, n_texts)
        return [
            self._cache("embedding", plan, where, 1, n_cells, later=True),
            *self._graph("embedding", plan, where, rows, rows, n_cells),
            Part("embedding", 4 * rows * self.vocabulary, later=True),  # llama.cpp computes logits of every row
        ]

    def _of_head(self, plan: Plan, where: _Where) -> list[Part]:
        """Returns the memory of the head's context, without its weights, and of the states that it is given."""
        if self.head is None:
            return []
        rows, n_cells = plan.slots * WAITING, cells(plan.n_ctx)
        logits = 4 * plan.slots * self.vocabulary
        size = plan.slots * n_cells * self._token(self.head, plan)
        size += max(self._activations(rows), logits) + 2 * rows * n_cells
        shares = where[len(self.layers) - 1]
        states = 4 * self.hidden * (chunks(self.options, on_gpu=bool(plan.n_gpu_layers)).budget + plan.slots + 2 * rows)
        devices = {device: math.ceil(share * size) for device, share in shares.items()}
        return [Part("head", states + logits + (0 if shares else size), devices=devices)]

    def _activations(self, rows: int) -> int:
        return 4 * rows * (4 * self.wide + 3 * self.feed_forward)

    def _attention(self, rows: int, n_cells: Sequence[int], here: Sequence[bool]) -> tuple[int, int]:
        """Returns the bytes of the masks and of every head's scores, which flash attention does not keep.

        Layers with a window have a mask of their own. ``here`` says which layers count.
        """
        layers = zip(self.layers, n_cells, here, strict=False)
        kinds = {layer.cache.window: count for layer, count, counts in layers if counts and layer.cache.keys}
        masks, largest = rows * sum(kinds.values()), rows * max(kinds.values(), default=0)
        return (4 * masks, 4 * self.heads * largest) if self.options.flash_attn == "off" else (2 * masks, 0)


def _layer(tensor: str, layers: Sequence[_LayerSizes]) -> _LayerSizes | None:
    """Returns the layer that a tensor belongs to; None for the others."""
    block = tensor.removeprefix("blk.").partition(".")[0]
    found = tensor.startswith("blk.") and block.isdecimal() and int(block) < len(layers)
    return layers[int(block)] if found else None


def _wide(header: GgufHeader, arch: str, hidden: int, heads: int) -> int:
    keys = heads * header.integer(f"{arch}.attention.key_length", 0)
    groups = header.integer(f"{arch}.ssm.group_count", 0) * header.integer(f"{arch}.ssm.state_size", 0)
    return max(hidden, keys, header.integer(f"{arch}.ssm.inner_size", 0) + 2 * groups)


def _feed_forward(header: GgufHeader, arch: str, n_layers: int, hidden: int) -> int:
    dense = max(header.per_layer(f"{arch}.feed_forward_length", n_layers, 4 * hidden))
    used = header.integer(f"{arch}.expert_used_count", 0) + header.integer(f"{arch}.expert_shared_count", 0)
    return max(dense, used * header.integer(f"{arch}.expert_feed_forward_length", 0))


def _started(devices: Sequence[str]) -> dict[str, int]:
    """Returns the bytes of each account that the use of devices takes, also of the RAM of the hosts that lend them."""
    sizes: dict[str, int] = {}
    for name in devices:
        host, lent, device = name.rpartition("/")
        if device != HOST_RAM:
            sizes[name] = DEVICE_CONTEXT
        if lent:
            sizes[f"{host}/{HOST_RAM}"] = _PROCESS + (0 if device == HOST_RAM else _DRIVER)
    return sizes


def _devices(where: _Where) -> tuple[str, ...]:
    """Returns the devices that hold a part of the model."""
    return tuple(dict.fromkeys(name for shares in where for name in shares))


def cache_bytes(kind: str, elements: int) -> int:
    """Returns the bytes of ``elements`` numbers in a KV cache of this type."""
    block, size = TENSOR_TYPES[CACHE_TYPES[kind]]
    return elements // block * size
