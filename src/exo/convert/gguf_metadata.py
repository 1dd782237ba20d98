"""A model's sizes and constants in a GGUF file's metadata, read and written."""

import math
from dataclasses import replace

import numpy as np

from exo.convert.architectures import (
    GEMMA3_PATTERN,
    OUTPUT,
    ROPE_FACTORS,
    Architecture,
    Hyperparameters,
    LinearScaling,
    Llama3Scaling,
    SlidingWindow,
)
from exo.convert.gguf_file import GgufModel, MetadataReader
from exo.convert.report import ConvertError
from exo.convert.tensor_data import Array

_DEFAULT_ROPE_BASE = 10_000.0
"""llama.cpp's default."""
_RELEASED = Llama3Scaling(1.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context=8192)
"""The scaling of every released Llama 3.1 to 3.3, except for the factor."""


def read_sizes(model: GgufModel, architecture: Architecture) -> Hyperparameters:
    """Raises ConvertError for metadata that the other format cannot express."""
    fields, shapes, name = model.metadata, model.shapes(), architecture.name
    # At most one layer for each tensor, so that a wrong number costs no memory.
    layers = fields.integer(f"{name}.block_count")
    if layers > len(shapes):
        raise ConvertError(f"{name}.block_count", f"is {layers}, but the file holds {len(shapes)} tensors")
    hidden = fields.integer(f"{name}.embedding_length")
    heads = fields.integer(f"{name}.attention.head_count")
    head_dim = fields.integer(f"{name}.attention.key_length", hidden // heads or 1)
    fields.expect(f"{name}.attention.value_length", head_dim)
    fields.expect(f"{name}.rope.dimension_count", head_dim)
    vocabulary = len(fields.texts("tokenizer.ggml.tokens"))
    fields.expect(f"{name}.vocab_size", vocabulary)
    _refuse_variants(fields, name)
    rope_base = fields.number(f"{name}.rope.freq_base", _DEFAULT_ROPE_BASE)
    return Hyperparameters(
        vocabulary=vocabulary,
        hidden=hidden,
        feed_forward=fields.integer(f"{name}.feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=fields.integer(f"{name}.attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=fields.integer(f"{name}.context_length"),
        norm_epsilon=fields.number(f"{name}.attention.layer_norm_rms_epsilon"),
        rope_base=rope_base,
        rope_scaling=_rope_scaling(model, name, rope_base, head_dim),
        sliding_window=_sliding_window(fields, name) if name == "gemma3" else None,
        tied=OUTPUT.gguf not in shapes,
    )


def _refuse_variants(fields: MetadataReader, name: str) -> None:
    """Refuses models that share the architecture's name but compute something else."""
    fields.expect(f"{name}.attention.causal", True)
    fields.expect(f"{name}.expert_count", 0)
    fields.expect(f"{name}.expert_used_count", 0)
    fields.expect(f"{name}.final_logit_softcapping", 0.0)
    fields.expect(f"{name}.rope.scaling.attn_factor", 1.0)
    # These describe the training and matter to yarn alone.
    fields.ignore(f"{name}.rope.scaling.finetuned", f"{name}.rope.scaling.original_context_length")


def _rope_scaling(model: GgufModel, name: str, base: float, head_dim: int) -> LinearScaling | Llama3Scaling | None:
    fields = model.metadata
    fields.expect(f"{name}.rope.scaling.type", "none", "linear")
    is_off = fields.text(f"{name}.rope.scaling.type", "linear") == "none"
    old_factor = fields.number(f"{name}.rope.scale_linear", 1.0)
    factor = fields.number(f"{name}.rope.scaling.factor", old_factor)
    if ROPE_FACTORS in model.shapes() and name == "llama":
        if model.shapes()[ROPE_FACTORS] != (head_dim // 2,):
            raise ConvertError(ROPE_FACTORS, f"has shape {model.shapes()[ROPE_FACTORS]}, expected ({head_dim // 2},)")
        return scaling_of(model.rows(ROPE_FACTORS, 0, 1)[0], base, head_dim, ROPE_FACTORS)
    return None if is_off or factor == 1.0 else LinearScaling(factor)


def _sliding_window(fields: MetadataReader, name: str) -> SlidingWindow:
    return SlidingWindow(
        size=fields.integer(f"{name}.attention.sliding_window"),
        pattern=fields.integer(f"{name}.attention.sliding_window_pattern", GEMMA3_PATTERN),
        rope_base=fields.number(f"{name}.rope.freq_base_swa", _DEFAULT_ROPE_BASE),
    )


def write_sizes(architecture: Architecture, sizes: Hyperparameters) -> dict[str, bool | int | float | str]:
    """Metadata keys. Raises ConvertError for sizes that llama.cpp has no key for."""
    name = architecture.name
    metadata: dict[str, bool | int | float | str] = {
        f"{name}.vocab_size": sizes.vocabulary,
        f"{name}.context_length": sizes.context_length,
        f"{name}.embedding_length": sizes.hidden,
        f"{name}.feed_forward_length": sizes.feed_forward,
        f"{name}.block_count": sizes.layers,
        f"{name}.attention.head_count": sizes.heads,
        f"{name}.attention.head_count_kv": sizes.kv_heads,
        f"{name}.attention.key_length": sizes.head_dim,
        f"{name}.attention.value_length": sizes.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": sizes.norm_epsilon,
        f"{name}.rope.dimension_count": sizes.head_dim,
        f"{name}.rope.freq_base": sizes.rope_base,
    }
    match sizes.rope_scaling:
        case LinearScaling(factor):
            metadata |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": factor}
        case Llama3Scaling() if name != "llama":
            raise ConvertError("config.json: rope_scaling", f"is llama3, which llama.cpp has for llama, not for {name}")
        case _:
            pass
    if sizes.sliding_window is not None:
        if sizes.sliding_window.pattern != GEMMA3_PATTERN:
            pattern = sizes.sliding_window.pattern
            raise ConvertError("config.json: sliding_window_pattern", f"is {pattern}, expected {GEMMA3_PATTERN}")
        metadata[f"{name}.attention.sliding_window"] = sizes.sliding_window.size
        metadata[f"{name}.rope.freq_base_swa"] = sizes.sliding_window.rope_base
    return metadata


def rope_factors(scaling: Llama3Scaling, base: float, head_dim: int) -> Array:
    """A GGUF's form of the scaling, a divisor for each frequency, [head_dim / 2].

    It is 1 for short wavelengths and ``factor`` for long ones. Formula: "llama3" in transformers' modeling_rope_utils.
    """
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def scaling_of(factors: Array, base: float, head_dim: int, tensor: str) -> Llama3Scaling:
    """The inverse of ``rope_factors``. Raises ConvertError naming ``tensor`` for factors of no released model."""
    largest = float(factors.max())
    scaling = replace(_RELEASED, factor=largest)
    if not np.allclose(factors, rope_factors(scaling, base, head_dim), rtol=1e-4, atol=0):
        raise ConvertError(tensor, "holds rotary factors that Llama 3's scaling with context 8192 does not give")
    return scaling
