"""Divides a model among devices, by the model card's settings and llama.cpp's own rules.

These rules are those of llama.cpp 0.5.0-dev (``llama_prepare_model_devices``, ``load_tensors``,
``llm_arch_supports_sm_tensor`` and ``llama_meta_device_get_split_state``).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.memory_plan import OnDevices
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_cuda.loading.devices import Gpu
from exo.worker.runner_cuda.loading.options import CPU, CudaOptions
from exo.worker.runner_cuda.plugin import has_nccl

WITHOUT_TENSOR = frozenset({
    "grok", "mpt", "plamo2", "minicpm3", "gemma3n", "mamba", "mamba2", "jamba", "falcon-h1", "olmo2", "olmoe",
    "deepseek2", "deepseek32", "hy_v4", "dots3note", "glm-dsa", "bitnet", "t5", "nemotron_h", "nemotron_h_moe",
    "granitehybrid", "minimax-01", "minimax-m2", "minimax-m3", "mistral4", "kimi-linear", "bailingmoe3", "kimi-k3",
    "glm5-next", "qwen3tts", "qwen4exp",
})  # fmt: skip
"""Architectures (``general.architecture``) that llama.cpp cannot split by "tensor"."""
_SHARED_OUT = re.compile(
    r"(?:blk\.\d+\.(?:attn_(?:q|k|v|qkv|output|gate)|ffn_(?:up|gate|gate_up|down)(?:_exps)?|ssm_\w+)|output)"
    r"(?:\.weight|\.bias)?"
)
"""Tensors that split mode "tensor" divides among the devices. Each device has a copy of every other tensor."""
_EXPERTS = r"\.ffn_(?:up|down|gate|gate_up)_(?:ch)?exps"
"""Tensors of all experts of a layer together; shared experts have other names."""


def chosen(options: CudaOptions, backend: str, present: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Returns the devices to load on, in the card's order, out of those ``present`` for ``backend``.

    It is empty for a model that stays on the CPU. Raises LoadError with the key that cannot be satisfied.
    """
    known = {each.name: each for each in present}
    wanted = () if options.devices == (CPU,) else options.devices
    names = tuple(known) if wanted is None else wanted
    for name in names:
        if name not in known:
            there = ", ".join(known) or CPU
            raise _refused(f"devices: {backend} has no device {name!r} here; it has {there}")
    gpus = tuple(known[name] for name in names)
    listed = ", ".join(names) or "none"
    if options.tensor_split is not None and len(options.tensor_split) != len(gpus):
        count = len(options.tensor_split)
        raise _refused(f"tensor_split: has {count} numbers, but must have one for each device in use: {listed}")
    if options.split_mode in ("row", "tensor") and not gpus:
        raise _refused(f'split_mode: "{options.split_mode}" needs a GPU, but none is in use')
    if options.split_mode == "row" and (lacking := [each.name for each in gpus if not each.splits_rows]):
        what = f"this build of llama.cpp cannot split rows over {', '.join(lacking)}"
        raise _refused(f'split_mode: {what}; "tensor" also puts a share of every layer on each device')
    if options.split_mode == "tensor" and len(gpus) > 2 and gpus[0].cuda and not has_nccl():  # two do not use it
        what = "llama.cpp's CUDA plug-in here is built without NCCL, over which three or more GPUs add up their parts"
        raise _refused(f'split_mode: {what} of a layer; choose two with devices, or "layer"')
    if options.main_gpu >= max(1, len(gpus)):
        raise _refused(f"main_gpu: is {options.main_gpu}, but must be an index from 0 of the devices in use: {listed}")
    if options.n_gpu_layers == 0:
        return ()
    return gpus[options.main_gpu : options.main_gpu + 1] if options.split_mode == "none" else gpus


def check_architecture(options: CudaOptions, header: GgufHeader) -> None:
    """Raises LoadError if a model of this architecture cannot be divided as the card asks."""
    architecture = header.text("general.architecture")
    if options.cpu_moe and not header.integer(f"{architecture}.expert_count", 0):
        raise _refused(f"cpu_moe: is {options.cpu_moe}, but the model has no experts")
    if options.split_mode == "tensor" and architecture in WITHOUT_TENSOR:
        raise _refused(f'split_mode: llama.cpp cannot split "{architecture}" models by "tensor"; "layer" works')


def is_expert(tensor: str) -> bool:
    """Whether a tensor has the weights of experts, which ``cpu_moe`` keeps in RAM."""
    return re.search(_EXPERTS, tensor) is not None


def experts_of(n_layers: int) -> str:
    """Returns a regular expression that finds the names of the experts' tensors in the first layers."""
    return rf"blk\.(?:{'|'.join(map(str, range(n_layers)))}){_EXPERTS}"


def tensor_splits(options: CudaOptions, devices: Sequence[Gpu]) -> tuple[tuple[float, ...], ...]:
    """Returns the proportions to consider if the card sets none: free memory, as in llama.cpp, and total memory.

    The chosen one is passed to llama.cpp, because the free memory may have changed when it loads.
    """
    if options.split_mode == "tensor" or options.tensor_split is not None or len(devices) < 2:
        return ()
    memory = [each.memory() for each in devices]
    both = (_shares([free for free, _ in memory]), _shares([total for _, total in memory]))
    return tuple(dict.fromkeys(both))


def placements(options: CudaOptions, devices: Sequence[Gpu], *, stated: bool) -> tuple[tuple[OnDevices, ...], ...]:
    """Returns the devices that the whole model may go on, the best first: one of them, the emptiest, or all of them.

    With ``stated`` the card says how the devices are used, so that only the proportions are open; if those are stated
    as well, nothing is. One device has nothing to choose.
    """
    splits = tensor_splits(options, devices)
    names = tuple(each.name for each in devices)
    divided = tuple(OnDevices(names, each, passing=each is not splits[-1]) for each in splits)
    if not divided:
        return ()
    emptiest = sorted(devices, key=lambda each: -each.memory()[0])
    return (divided,) if stated else (tuple(OnDevices((each.name,)) for each in emptiest), divided)


def _shares(sizes: Sequence[int]) -> tuple[float, ...]:
    return tuple(round(size / sum(sizes), 3) for size in sizes) if any(sizes) else (1.0,) * len(sizes)


def elsewhere(options: CudaOptions, devices: Sequence[Gpu], present: Sequence[Gpu]) -> tuple[tuple[str, ...], ...]:
    """Returns alternatives to the chosen devices, for a remedy: each present device by itself, and all of them."""
    if not devices or options.tensor_split is not None or options.main_gpu:
        return ()
    names = tuple(each.name for each in present)
    all_of_them = [names] if options.split_mode != "none" else []
    here = {each.name for each in devices}
    return tuple(dict.fromkeys(each for each in [*((name,) for name in names), *all_of_them] if set(each) != here))


def _refused(message: str) -> LoadError:
    return LoadError("model_misconfigured", f"model card, [cuda] {message}")


def shared_out(tensor: str) -> bool:
    """Whether split mode "tensor" divides this tensor among the devices, instead of copying it to each."""
    return _SHARED_OUT.fullmatch(tensor) is not None


@dataclass(frozen=True, slots=True)
class Placement:
    """How devices share a model: whole layers on each or, ``by_tensor``, a share of each layer on each.

    ``shares`` are proportions. They are as many as ``devices``, and their sum is positive.
    """

    devices: tuple[str, ...]
    shares: tuple[float, ...]
    by_tensor: bool = False

    def layers(self, n_layers: int, n_device: int) -> list[dict[str, float]]:
        """Returns the share of each layer on each device, by name; empty for a layer on the CPU.

        The result has ``n_layers`` + 1 entries, the last one for the output. ``n_device`` is llama.cpp's
        ``n_gpu_layers``.
        """
        n_device = min(n_device, n_layers + 1) if self.devices else 0
        host: list[dict[str, float]] = [{} for _ in range(n_layers + 1 - n_device)]
        if self.by_tensor:
            total = sum(self.shares)
            return host + [{n: s / total for n, s in zip(self.devices, self.shares, strict=True)}] * n_device
        # float32, as in llama.cpp, so that rounding puts a layer on the border on the same side.
        ends = np.array(list(accumulate(np.float32(each) for each in self.shares)), np.float32)
        places = np.arange(n_device, dtype=np.float32) / np.float32(max(1, n_device))
        at = np.searchsorted(ends / ends[-1], places, side="right") if n_device else ()
        return host + [{self.devices[index]: 1.0} for index in at]
