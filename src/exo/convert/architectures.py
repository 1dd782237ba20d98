"""The architectures that can be converted, and a model's sizes and constants, free of either format's names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from exo.convert.report import ConvertError

Size = Literal["vocabulary", "hidden", "feed_forward", "q_width", "kv_width", "head_dim"]
Change = Literal["none", "rotary", "offset"]
"""How a tensor's numbers differ. ``rotary``: llama.cpp's llama rotates neighbouring rows of a head, Hugging Face's rows
half a head apart. ``offset``: Hugging Face's gemma adds 1 to a norm's weight when it runs; in a GGUF it is added."""

GEMMA3_PATTERN = 6
"""The pattern of every released gemma3. Older readers of GGUF files know no other."""
_GEMMA3_LAYERS_OF_27B = 62


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Divides positions by ``factor``. In gemma3 it holds only for the layers that see the whole context."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's scaling: stretches long wavelengths by ``factor``, keeps short ones, interpolates between."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Gemma 3's attention: every ``pattern``-th layer sees the whole context, the others ``size`` tokens."""

    size: int
    pattern: int
    rope_base: float
    """For the layers with the window."""


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """A model's sizes in elements. Raises ConvertError if they contradict each other."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope_base: float
    rope_scaling: LinearScaling | Llama3Scaling | None
    sliding_window: SlidingWindow | None
    tied: bool
    """Whether the embedding serves as the output matrix too."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConvertError("key/value heads", f"{self.kv_heads} does not divide the {self.heads} heads")
        if self.head_dim % 2:
            raise ConvertError("head dimension", f"{self.head_dim} is odd, but rotary embeddings turn pairs")

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def size(self, name: str) -> int:
        """A size by the name that ``Rule`` uses."""
        return int(getattr(self, name))


@dataclass(frozen=True, slots=True)
class Rule:
    """A tensor under both names: one of every layer, or one of the model if the names have no ``{}``.

    Matrices are [out, in].
    """

    gguf: str
    hugging_face: str
    shape: tuple[Size, ...]
    change: Change = "none"


@dataclass(frozen=True, slots=True)
class Architecture:
    """``name`` is a GGUF's ``general.architecture``; ``model_type`` and ``class_name`` are config.json's."""

    name: str
    model_type: str
    class_name: str
    rules: tuple[Rule, ...]
    activation: str = "silu"
    activation_key: str = "hidden_act"
    default_rope_base: float = 10_000.0
    """Hugging Face's default."""


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor of a model under both names."""

    gguf: str
    hugging_face: str
    shape: tuple[int, ...]
    change: Change


EMBEDDING = Rule("token_embd.weight", "model.embed_tokens.weight", ("vocabulary", "hidden"))
OUTPUT = Rule("output.weight", "lm_head.weight", ("vocabulary", "hidden"))
"""Absent if the embedding serves as the output matrix too."""
ROPE_FACTORS = "rope_freqs.weight"
"""GGUF only. Hugging Face has a ``rope_scaling`` of type llama3 instead."""

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
    return "x".join(map(str, shape)) or "()"


def gemma3_query_scalar(sizes: Hyperparameters) -> int:
    """Queries are divided by the root of this: the head dimension, but in the 27B model hidden size / heads.

    llama.cpp has no key for it and recognises the 27B model by its number of layers.
    """
    return sizes.hidden // sizes.heads if sizes.layers == _GEMMA3_LAYERS_OF_27B else sizes.head_dim
