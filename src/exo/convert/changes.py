"""How the two formats' numbers differ, tensor by tensor; see ``Change``."""

import numpy as np

from exo.convert.architectures import Change
from exo.convert.tensor_data import Array


def to_hugging_face(values: Array, change: Change, head_dim: int) -> Array:
    """Whole heads' rows of a matrix, or a vector as one row, from llama.cpp's conventions."""
    match change:
        case "rotary":
            return _swap_pairs(values, head_dim // 2, 2)
        case "offset":
            return values - np.float32(1)
        case "none":
            return values


def to_gguf(values: Array, change: Change, head_dim: int) -> Array:
    """The inverse of ``to_hugging_face``, exact but for the rounding of the offset."""
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
