"""Tensor data in memory: stored rows to float32 and back through gguf-py, and the two formats' conventions."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from exo.convert.architectures import Change
from exo.convert.report import ConvertError

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Kind = gguf.GGMLQuantizationType

_LARGEST = {Kind.F16: 65504.0, Kind.BF16: float.fromhex("0x1.fep127"), Kind.Q8_0: 65504.0 * 127}
"""The largest magnitude that each type can hold; Q8_0's scale is a float16."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor as stored. ``shape`` has the outermost dimension first."""

    shape: tuple[int, ...]
    dtype: str
    rows: Bytes
    """[rows, bytes of a row]; a vector is one row."""


def map_file(path: Path) -> Bytes:
    """A file's bytes, which are read when they are used."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    # A slice of a plain array costs a fraction of a slice of a memmap, so this converts once.
    return np.asarray(np.memmap(path, np.uint8, "r"))


def decode(rows: Bytes, kind: Kind) -> Array:
    """[rows, bytes of a row] to [rows, columns]."""
    return gguf.dequantize(np.ascontiguousarray(rows), kind)


@cache
def can_decode(kind: Kind) -> bool:
    """Whether gguf-py can dequantise the type, found out with one block."""
    try:
        decode(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def encode(values: Array, kind: Kind, tensor: str) -> Bytes:
    """[rows, columns] to [rows, bytes of a row].

    Raises ConvertError naming ``tensor`` for a value that is infinite, not a number, or too large for ``kind``.
    """
    check_range(values, kind, tensor)
    return gguf.quantize(values, kind).view(np.uint8)


def check_range(values: Array, kind: Kind, tensor: str) -> None:
    """Raises ConvertError as ``encode`` does. float32 holds every value."""
    if kind == Kind.F32:
        return
    magnitude = float(np.abs(values).max())
    if not magnitude <= _LARGEST[kind]:  # true for NaN too
        reach = _LARGEST[kind]
        raise ConvertError(tensor, f"holds {magnitude:g}, but {kind.name} reaches {reach:g}; f32 keeps every value")


def to_hugging_face(values: Array, change: Change, head_dim: int) -> Array:
    """Rows of whole heads, or a vector as one row, from llama.cpp's conventions. See ``Change``."""
    match change:
        case "rotary":
            return _swap_pairs(values, head_dim // 2, 2)
        case "offset":
            return values - np.float32(1)
        case "none":
            return values


def to_gguf(values: Array, change: Change, head_dim: int) -> Array:
    """The inverse of ``to_hugging_face``, exact except for the rounding of the offset."""
    match change:
        case "rotary":
            return _swap_pairs(values, 2, head_dim // 2)
        case "offset":
            return values + np.float32(1)
        case "none":
            return values


def _swap_pairs(values: Array, outer: int, inner: int) -> Array:
    heads = values.reshape(-1, outer, inner, values.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
