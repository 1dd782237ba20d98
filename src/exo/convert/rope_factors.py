"""Llama 3.1's rotary scaling as one divisor for each frequency, the form in which a GGUF has it.

Formula: "llama3" in Hugging Face transformers' modeling_rope_utils, stated for config.json's ``rope_scaling``.
"""

import math

import numpy as np

from exo.convert.hyperparameters import Llama3Scaling
from exo.convert.report import ConvertError
from exo.convert.tensor_data import Array

_RELEASED = Llama3Scaling(1.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=8192)
"""What every released Llama 3.1 to 3.3 has, but for the factor."""


def rope_factors(scaling: Llama3Scaling, base: float, head_dim: int) -> Array:
    """[head_dim / 2]: 1 for wavelengths that the original context holds often, ``factor`` for those it does not."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def scaling_of(factors: Array, base: float, head_dim: int, tensor: str) -> Llama3Scaling:
    """The scaling that gives ``factors``. Raises ConvertError naming ``tensor`` if no released model's does."""
    largest = float(factors.max())
    scaling = Llama3Scaling(
        largest, _RELEASED.low_frequency_factor, _RELEASED.high_frequency_factor, _RELEASED.original_context
    )
    if not np.allclose(factors, rope_factors(scaling, base, head_dim), rtol=1e-4, atol=0):
        raise ConvertError(tensor, "holds rotary factors that Llama 3's scaling with context 8192 does not give")
    return scaling
