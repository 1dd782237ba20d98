"""Writes a tiny random projector as a GGUF file, with which a tiny model of llama.cpp's sees pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from numpy.typing import NDArray

Kind = Literal["gemma3", "mlp", "qwen2vl_merger"]
"""Gemma 3's, whose tokens see each other; LLaVA's, whose tokens see those before them; Qwen2-VL's, whose tokens are in
rows and columns, as many as the picture's size makes of it."""

TOKENS: dict[Kind, int] = {"gemma3": 16, "mlp": 64, "qwen2vl_merger": 12}
"""The tokens of a picture of 64 x 48 pixels, with the usual sizes."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a projector: pixels of the square to which it scales a picture and of a patch, and the network's."""

    side: int = 64
    patch: int = 8
    merged: int = 2
    """The square root of the number of patches that become one of Gemma's tokens."""
    width: int = 32
    feed_forward: int = 64
    layers: int = 2
    heads: int = 2

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


def write_projector(path: Path, kind: Kind, hidden: int, sizes: Sizes = Sizes()) -> None:
    """Write a projector for models whose tokens have vectors of `hidden` numbers. Equal arguments give equal bytes."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", kind)
    writer.add_bool("clip.use_gelu", True)
    numbers = {
        "image_size": sizes.side, "patch_size": sizes.patch, "embedding_length": sizes.width,
        "feed_forward_length": sizes.feed_forward, "block_count": sizes.layers, "projection_dim": hidden,
        "attention.head_count": sizes.heads, "projector.scale_factor": sizes.merged,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    for name, values in _tensors(kind, hidden, sizes).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(kind: Kind, hidden: int, sizes: Sizes) -> dict[str, NDArray[np.float32]]:
    random, width, patch = np.random.default_rng(0), sizes.width, sizes.patch

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return random.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))

    def ones() -> NDArray[np.float32]:
        return np.ones(width, np.float32)

    def zeros(size: int) -> NDArray[np.float32]:
        return np.zeros(size, np.float32)

    def patches() -> NDArray[np.float32]:
        return matrix(width, 3 * patch * patch).reshape(width, 3, patch, patch)

    tensors = {"v.patch_embd.weight": patches(), "v.post_ln.weight": ones(), "v.post_ln.bias": zeros(width)}
    if kind == "qwen2vl_merger":
        tensors["v.patch_embd.weight.1"] = patches()
    else:
        tensors["v.patch_embd.bias"] = zeros(width)
        tensors["v.position_embd.weight"] = matrix(sizes.patches, width)
    for layer in range(sizes.layers):
        block = f"v.blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensors[f"{block}.{name}.weight"] = matrix(width, width)
            tensors[f"{block}.{name}.bias"] = zeros(width)
        for name in ("ln1", "ln2"):
            tensors[f"{block}.{name}.weight"] = ones()
            tensors[f"{block}.{name}.bias"] = zeros(width)
        for name, rows, columns in (("ffn_up", sizes.feed_forward, width), ("ffn_down", width, sizes.feed_forward)):
            tensors[f"{block}.{name}.weight"] = matrix(rows, columns)
            tensors[f"{block}.{name}.bias"] = zeros(rows)
    if kind == "gemma3":
        tensors["mm.soft_emb_norm.weight"] = ones()
        tensors["mm.input_projection.weight"] = np.ascontiguousarray(matrix(hidden, width).T)
    else:
        read = width if kind == "mlp" else 4 * width
        tensors |= {"mm.0.weight": matrix(hidden, read), "mm.0.bias": zeros(hidden)}
        tensors |= {"mm.2.weight": matrix(hidden, hidden), "mm.2.bias": zeros(hidden)}
    return tensors
