"""Random adapters (LoRA) of tiny models: one set of matrices, written for llama.cpp, and for vLLM and MLX."""

import json
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from tests.support.tiny.gguf_file import BLOCK_NAMES
from tests.support.tiny.shape import Shape

RANK = 4
_MODULES = ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Those whose rows are in the same order in both formats."""
Pairs = dict[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""The matrices A [rank, in] and B [out, rank], by layer and module."""


def write_gguf_adapter(
    path: Path, shape: Shape, seed: int = 1, *, alpha: float = float(RANK), also: int | None = None
) -> None:
    """Write an adapter as GGUF. With the default ``alpha``, what it adds is as large as what the modules compute.

    One with ``also`` adds what the adapters of both seeds add, if ``alpha`` is twice as large.
    """
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    more = {} if also is None else _pairs(shape, also)
    for (layer, module), (a, b) in _pairs(shape, seed).items():
        if also is not None:
            other = more[layer, module]
            a, b = np.concatenate([a, other[0]]), np.concatenate([b, other[1]], axis=1)
        name = f"blk.{layer}.{BLOCK_NAMES[module]}.weight"
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_peft_adapter(folder: Path, shape: Shape, seed: int = 1, **config: object) -> None:
    """Write the same adapter in PEFT's format. ``config`` replaces settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, NDArray[np.float32]] = {}
    for (layer, module), pair in _pairs(shape, seed).items():
        for half, matrix in zip("AB", pair, strict=True):
            tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"] = matrix
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [module.rpartition(".")[2] for module in _MODULES]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))


def _pairs(shape: Shape, seed: int) -> Pairs:
    draw = np.random.default_rng(seed)
    outputs = dict.fromkeys(_MODULES, shape.feed_forward) | {"self_attn.v_proj": shape.kv_width}

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (draw.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    return {
        (layer, module): (matrix(RANK, shape.hidden), matrix(outputs[module], RANK))
        for layer in range(shape.layer_count)
        for module in _MODULES
    }
