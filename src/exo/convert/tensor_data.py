"""Tensor data to float32 and back, through gguf-py's quantisations."""

from functools import cache

import gguf
import numpy as np
import numpy.typing as npt

from exo.convert.report import ConvertError

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Kind = gguf.GGMLQuantizationType

_LARGEST = {
    Kind.F16: 65504.0,
    Kind.BF16: float.fromhex("0x1.fep127"),
    Kind.Q8_0: 65504.0 * 127,
}
"""The largest magnitude that each can hold; Q8_0's scale is a float16."""


def decode(rows: Bytes, kind: Kind) -> Array:
    """[rows, bytes of a row] to [rows, columns]."""
    return gguf.dequantize(np.ascontiguousarray(rows), kind)


@cache
def can_decode(kind: Kind) -> bool:
    """Whether gguf-py knows the type, asked by dequantising one block."""
    try:
        decode(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def encode(values: Array, kind: Kind, tensor: str) -> Bytes:
    """[rows, columns] to [rows, bytes of a row].

    Raises ConvertError naming ``tensor`` where a value does not fit, is infinite or not a number.
    """
    check_range(values, kind, tensor)
    return gguf.quantize(values, kind).view(np.uint8)


def check_range(values: Array, kind: Kind, tensor: str) -> None:
    """Raises ConvertError; see ``encode``. float32 holds every value."""
    if kind == Kind.F32:
        return
    magnitude = float(np.abs(values).max())
    # Written so that NaN fails too.
    if not magnitude <= _LARGEST[kind]:
        reach = _LARGEST[kind]
        raise ConvertError(tensor, f"holds {magnitude:g}, but {kind.name} reaches {reach:g}; f32 keeps every value")
