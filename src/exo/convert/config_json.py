"""A model's sizes and constants in config.json, read and written. Its keys are Hugging Face's."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue

from exo.convert.architectures import (
    GEMMA3_PATTERN,
    Architecture,
    Hyperparameters,
    LinearScaling,
    Llama3Scaling,
    SlidingWindow,
    by_model_type,
    gemma3_query_scalar,
)
from exo.convert.hf_folder import StrictJson
from exo.convert.mlx_quantisation import Quantisation
from exo.convert.report import ConvertError
from exo.worker.runner_common.model_files.folder_config import inexpressible

_Count = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Off = Literal[False] | None
_GEMMA3_LOCAL_ROPE_BASE = 10_000.0

_IGNORED = frozenset(
    ("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "_name_or_path")
)
"""Keys about files and training, which do not change the model's computation."""


class RopeScaling(StrictJson):
    """How rotary embeddings are stretched beyond the context of the first training."""

    rope_type: str | None = None
    type: str | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive = 1.0
    high_freq_factor: _Positive = 4.0
    original_max_position_embeddings: _Count = 8192


class Config(StrictJson):
    """The keys of config.json that are read. Those with one accepted value turn on variants that are refused."""

    model_config = ConfigDict(extra="allow")

    model_type: str
    vocab_size: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    max_position_embeddings: _Count
    rms_norm_eps: _Positive
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    rope_theta: _Positive | None = None
    rope_scaling: RopeScaling | None = None
    rope_parameters: JsonValue = None
    """The same in the form of transformers 5; see ``folder_config``."""
    rope_local_base_freq: _Positive | None = None
    sliding_window: _Count | None = None
    sliding_window_pattern: _Count | None = None
    layer_types: list[str] | None = None
    query_pre_attn_scalar: _Positive | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    quantization: Quantisation | None = None
    quantization_config: JsonValue = None
    attention_bias: bool | None = None
    mlp_bias: _Off = None
    use_sliding_window: _Off = None
    use_bidirectional_attention: _Off = None
    rope_traditional: _Off = None
    partial_rotary_factor: Literal[1] | None = None
    final_logit_softcapping: None = None
    attn_logit_softcapping: None = None

    def left_out(self) -> list[str]:
        return [f"config.json: {key}" for key in sorted((self.model_extra or {}).keys() - _IGNORED)]


def read_config(config: Config, *, has_output: bool) -> tuple[Architecture, Hyperparameters]:
    """``has_output``: the model has an output matrix besides the embedding.

    Raises ConvertError for a configuration that llama.cpp cannot express.
    """
    architecture = by_model_type(config.model_type)
    _refuse_variants(config, architecture)
    sizes = Hyperparameters(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        context_length=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_base=config.rope_theta or architecture.default_rope_base,
        rope_scaling=_rope_scaling(config.rope_scaling),
        sliding_window=_sliding_window(config) if architecture.name == "gemma3" else None,
        tied=not has_output if config.tie_word_embeddings is None else config.tie_word_embeddings,
    )
    _check_layers(config, sizes)
    if config.query_pre_attn_scalar not in (None, gemma3_query_scalar(sizes)):
        expected = gemma3_query_scalar(sizes)
        raise _wrong("query_pre_attn_scalar", config.query_pre_attn_scalar, f"{expected}, which llama.cpp has built in")
    return architecture, sizes


def _refuse_variants(config: Config, architecture: Architecture) -> None:
    rope = config.rope_parameters if isinstance(config.rope_parameters, dict) else {}
    if (part := inexpressible({"rope_parameters": rope})) is not None:
        raise _wrong(part.replace(".", ": "), rope[part.partition(".")[2]], "a rope_type of default")
    if config.quantization is None and config.quantization_config is not None:
        raise ConvertError("config.json: quantization_config", "only MLX's own quantisation can be read")
    activation = config.hidden_activation or config.hidden_act
    if activation not in (None, architecture.activation):
        raise _wrong(architecture.activation_key, activation, architecture.activation)
    if config.attention_bias and architecture.name != "qwen2":
        raise _wrong("attention_bias", True, f"false for {architecture.model_type}")
    # Qwen's configurations have a window that use_sliding_window turns off.
    if architecture.name == "llama" and config.sliding_window is not None:
        raise _wrong("sliding_window", config.sliding_window, "null for llama")


def _rope_scaling(rope: RopeScaling | None) -> LinearScaling | Llama3Scaling | None:
    kind = (rope.rope_type or rope.type or "default") if rope is not None else "default"
    if rope is None or kind == "default":
        return None
    if rope.factor is None or kind not in ("linear", "llama3"):
        raise _wrong("rope_scaling", kind, "default, linear or llama3, the last two with a factor")
    if kind == "linear":
        return LinearScaling(rope.factor)
    return Llama3Scaling(
        rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    )


def _sliding_window(config: Config) -> SlidingWindow:
    if config.sliding_window is None:
        raise _wrong("sliding_window", None, "a number of tokens for gemma3")
    return SlidingWindow(
        size=config.sliding_window,
        pattern=config.sliding_window_pattern or GEMMA3_PATTERN,
        rope_base=config.rope_local_base_freq or _GEMMA3_LOCAL_ROPE_BASE,
    )


def _check_layers(config: Config, sizes: Hyperparameters) -> None:
    pattern = None if sizes.sliding_window is None else sizes.sliding_window.pattern
    expected = [
        "full_attention" if pattern is None or (layer + 1) % pattern == 0 else "sliding_attention"
        for layer in range(sizes.layers if config.layer_types is not None else 0)
    ]
    if config.layer_types not in (None, expected):
        rule = "full_attention in every layer" if pattern is None else f"full_attention in every {pattern}th layer"
        raise _wrong("layer_types", config.layer_types, rule)


def _wrong(key: str, value: object, expected: str) -> ConvertError:
    return ConvertError(f"config.json: {key}", f"is {value!r}, expected {expected}")


def write_config(architecture: Architecture, sizes: Hyperparameters) -> dict[str, JsonValue]:
    """The keys that define the model's computation."""
    config: dict[str, JsonValue] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.context_length,
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_theta": sizes.rope_base,
        "tie_word_embeddings": sizes.tied,
        architecture.activation_key: architecture.activation,
        "attention_bias": architecture.name == "qwen2",
    }
    match sizes.rope_scaling:
        case LinearScaling(factor):
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, original):
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case None:
            pass
    if sizes.sliding_window is not None:
        config["query_pre_attn_scalar"] = gemma3_query_scalar(sizes)
        config["rope_local_base_freq"] = sizes.sliding_window.rope_base
        config["sliding_window"] = sizes.sliding_window.size
        config["sliding_window_pattern"] = sizes.sliding_window.pattern
    return config
