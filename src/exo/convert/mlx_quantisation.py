"""MLX's affine quantisation, done by mlx: groups along a row share a scale and a bias, w = scale * q + bias."""

from importlib.util import find_spec
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

from exo.convert.report import Bits, ConvertError
from exo.convert.tensor_data import Array, Bytes, Kind

GROUP_SIZE = 64
"""mlx-lm's default."""


class AffineSettings(BaseModel):
    """How a matrix is quantised. MLX's other modes are refused."""

    model_config = ConfigDict(frozen=True, strict=True)

    group_size: Literal[32, 64, 128] = GROUP_SIZE
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    mode: Literal["affine"] = "affine"


class Quantisation(BaseModel):
    """config.json's ``quantization``: settings for all matrices, and under a module's name the ones that differ.

    False marks a module that is not quantised.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    default: AffineSettings
    modules: dict[str, AffineSettings | Literal[False]]

    @model_validator(mode="before")
    @classmethod
    def _by_module(cls, written: JsonValue) -> JsonValue:
        if not isinstance(written, dict):
            return written
        modules = {key: value for key, value in written.items() if key not in AffineSettings.model_fields}
        return {"default": {key: written[key] for key in written.keys() - modules.keys()}, "modules": modules}

    def of_module(self, name: str) -> AffineSettings:
        return self.modules.get(name) or self.default


def require_mlx() -> None:
    """Raises ConvertError if mlx is not installed."""
    if find_spec("mlx") is None:
        raise ConvertError("mlx", "this package is needed for MLX's quantisation: pip install 'exo[mlx]'")


def dequantise(packed: npt.NDArray[np.uint32], scales: Array, biases: Array, settings: AffineSettings) -> Array:
    """[rows, columns * bits / 32] with scales and biases [rows, columns / group_size] to [rows, columns]."""
    import mlx.core as mx

    rows = mx.dequantize(
        mx.array(packed), mx.array(scales), mx.array(biases), settings.group_size, settings.bits, settings.mode
    )
    return np.asarray(rows, np.float32)


def quantise(values: Array, bits: Bits, kind: Kind) -> tuple[Bytes, Bytes, Bytes]:
    """Rows in groups of ``GROUP_SIZE`` to packed weights, scales and biases, the last two stored as ``kind``."""
    import mlx.core as mx

    dtype, same_size = {
        Kind.F32: (mx.float32, mx.uint32),
        Kind.F16: (mx.float16, mx.uint16),
        Kind.BF16: (mx.bfloat16, mx.uint16),
    }[kind]
    # Rounded first, as mlx-lm does: it quantises the model in the model's own number format.
    packed, scales, biases = mx.quantize(mx.array(values).astype(dtype), GROUP_SIZE, bits)
    # numpy has no bfloat16, so the bits travel as whole numbers.
    raw = (packed, scales.view(same_size), biases.view(same_size))
    first, second, third = (np.asarray(array).view(np.uint8) for array in raw)
    return first, second, third
