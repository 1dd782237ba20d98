"""Estimates the memory of a projector from its file's header.

The formula of the graph is fitted to the buffers that llama.cpp 0.5.0-dev reserves for Gemma 3's and LLaVA's projectors
of 336 to 896 pixels; it gives up to a fifth more.
"""

from collections.abc import Collection

from exo.worker.runner_common.memory_plan import Part, Plan
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_cuda.loading.gguf_check import projector_kind
from exo.worker.runner_cuda.loading.options import CudaOptions

_PATCHES = {"gemma4v": 1120 * 9, "gemma4uv": 1120} | {f"qwen{each}vl_merger": 4096 * 4 for each in ("2", "2.5", "3")}
"""The most patches of projectors that scale a picture to a number of tokens and not to one size."""
_DECODING = 128 << 20
"""Bytes of RAM for a picture with the most pixels: in the command, decoded, and in llama.cpp's copies."""


def projector_parts(header: GgufHeader, options: CudaOptions, plan: Plan, remote: Collection[str]) -> list[Part]:
    """Returns the memory of a projector, which is on the first device that is not ``remote``, or in RAM.

    Pages of its graph in RAM are taken by the first picture.
    """
    weights, graph = sum(tensor.size for tensor in header.tensors), _graph(header, options)
    near = [name for name in plan.devices if name not in remote]
    if plan.n_gpu_layers is not None and near and plan.projector_on_gpu:
        place = [Part("projector", devices={near[0]: weights + graph})]
    else:
        place = [Part("projector", weights), Part("projector", graph, later=True)]
    return [*place, Part("projector", _DECODING, later=True)]


def _graph(header: GgufHeader, options: CudaOptions) -> int:
    """Returns the bytes of the graph that encodes a picture."""

    def number(key: str) -> int:
        return header.integer(f"clip.vision.{key}", 0)

    side, patch, width = number("image_size"), max(1, number("patch_size")), number("embedding_length")
    pixels = max(side * side, number("image_max_pixels"))
    patches = _PATCHES.get(projector_kind(header), pixels // patch**2)
    scores = patches * number("attention.head_count") if options.flash_attn == "off" else 0
    return 4 * (patches * (3 * width + number("feed_forward_length") + scores) + 3 * pixels)
