"""The architectures that can be converted: every tensor under both names, its shape, and how its numbers differ."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from exo.convert.hyperparameters import Hyperparameters
from exo.convert.report import ConvertError

Size = Literal["vocabulary", "hidden", "feed_forward", "q_width", "kv_width", "head_dim"]
Change = Literal["none", "rotary", "offset"]
"""``rotary``: llama.cpp's llama rotates neighbouring rows of a head, Hugging Face's rows half a head apart.
``offset``: Hugging Face's gemma adds 1 to a norm's weight when it runs, llama.cpp has it added in the file."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of every layer, or of the model where the names have no ``{}``. Matrices are [out, in]."""

    gguf: str
    hugging_face: str
    shape: tuple[Size, ...]
    change: Change = "none"


@dataclass(frozen=True, slots=True)
class Architecture:
    """``name`` is ``general.architecture`` of a GGUF, ``model_type`` and ``class_name`` are of config.json."""

    name: str
    model_type: str
    class_name: str
    rules: tuple[Rule, ...]
    activation: str = "silu"
    activation_key: str = "hidden_act"
    default_rope_base: float = 10_000.0
    """Hugging Face's, where config.json does not say."""


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor under both names."""

    gguf: str
    hugging_face: str
    shape: tuple[int, ...]
    change: Change


EMBEDDING = Rule("token_embd.weight", "model.embed_tokens.weight", ("vocabulary", "hidden"))
OUTPUT = Rule("output.weight", "lm_head.weight", ("vocabulary", "hidden"))
"""Absent where the embedding serves as the output matrix too."""
ROPE_FACTORS = "rope_freqs.weight"
"""GGUF only: what Hugging Face states as a ``rope_scaling`` of type llama3."""

_ATTENTION = (
    Rule("blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight", ("q_width", "hidden")),
    Rule("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight", ("kv_width", "hidden")),
    Rule("blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight", ("kv_width", "hidden")),
    Rule("blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight", ("hidden", "q_width")),
)
_ROTARY_ATTENTION = (
    Rule("blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight", ("q_width", "hidden"), "rotary"),
    Rule("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight", ("kv_width", "hidden"), "rotary"),
    *_ATTENTION[2:],
)
_ATTENTION_BIASES = (
    Rule("blk.{}.attn_q.bias", "model.layers.{}.self_attn.q_proj.bias", ("q_width",)),
    Rule("blk.{}.attn_k.bias", "model.layers.{}.self_attn.k_proj.bias", ("kv_width",)),
    Rule("blk.{}.attn_v.bias", "model.layers.{}.self_attn.v_proj.bias", ("kv_width",)),
)
_FEED_FORWARD = (
    Rule("blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight", ("feed_forward", "hidden")),
    Rule("blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight", ("feed_forward", "hidden")),
    Rule("blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight", ("hidden", "feed_forward")),
)
_NORMS = (
    Rule("output_norm.weight", "model.norm.weight", ("hidden",)),
    Rule("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight", ("hidden",)),
    Rule("blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", ("hidden",)),
)
_QK_NORMS = (
    Rule("blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight", ("head_dim",)),
    Rule("blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight", ("head_dim",)),
)
_GEMMA_NORMS = (
    Rule("output_norm.weight", "model.norm.weight", ("hidden",), "offset"),
    Rule("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight", ("hidden",), "offset"),
    Rule("blk.{}.post_attention_norm.weight", "model.layers.{}.post_attention_layernorm.weight", ("hidden",), "offset"),
    Rule("blk.{}.ffn_norm.weight", "model.layers.{}.pre_feedforward_layernorm.weight", ("hidden",), "offset"),
    Rule("blk.{}.post_ffw_norm.weight", "model.layers.{}.post_feedforward_layernorm.weight", ("hidden",), "offset"),
    Rule("blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight", ("head_dim",), "offset"),
    Rule("blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight", ("head_dim",), "offset"),
)

ARCHITECTURES = (
    Architecture("llama", "llama", "LlamaForCausalLM", (*_ROTARY_ATTENTION, *_FEED_FORWARD, *_NORMS)),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", (*_ATTENTION, *_ATTENTION_BIASES, *_FEED_FORWARD, *_NORMS)),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", (*_ATTENTION, *_QK_NORMS, *_FEED_FORWARD, *_NORMS)),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        (*_ATTENTION, *_FEED_FORWARD, *_GEMMA_NORMS),
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        default_rope_base=1_000_000.0,
    ),
)


def by_gguf_name(name: str) -> Architecture:
    """Raises ConvertError."""
    known = {architecture.name: architecture for architecture in ARCHITECTURES}
    return _known(known, "general.architecture", name)


def by_model_type(model_type: str) -> Architecture:
    """Raises ConvertError."""
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    return _known(known, "config.json: model_type", model_type)


def _known(known: Mapping[str, Architecture], key: str, name: str) -> Architecture:
    if name not in known:
        raise ConvertError(key, f"{name!r} cannot be converted; accepted: {', '.join(known)}")
    return known[name]


def tensor_pairs(architecture: Architecture, sizes: Hyperparameters) -> list[TensorPair]:
    """Every tensor that a model of these sizes has, in the order of the layers."""
    output = () if sizes.tied else (OUTPUT,)
    rules = (EMBEDDING, *architecture.rules, *output)
    whole = [rule for rule in rules if "{}" not in rule.gguf]
    layered = [rule for rule in rules if "{}" in rule.gguf]
    pairs = [_pair(rule, sizes, None) for rule in whole]
    return pairs + [_pair(rule, sizes, layer) for layer in range(sizes.layers) for rule in layered]


def _pair(rule: Rule, sizes: Hyperparameters, layer: int | None) -> TensorPair:
    shape = tuple(sizes.size(name) for name in rule.shape)
    return TensorPair(rule.gguf.format(layer), rule.hugging_face.format(layer), shape, rule.change)


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], model: str) -> None:
    """Raises ConvertError naming a tensor that is missing, unknown or of another shape than ``model``'s sizes give."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise ConvertError(missing[0], f"this tensor of a {model} model is missing{_more(missing)}")
    unknown = sorted(name for name in found if name not in expected)
    if unknown:
        raise ConvertError(unknown[0], f"no such tensor is known in a {model} model{_more(unknown)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConvertError(name, f"has shape {_text(found[name])}, expected {_text(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _text(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "()"
