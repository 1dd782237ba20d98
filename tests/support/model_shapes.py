"""Headers of the built-in models' GGUF files, made from the models' published shapes. They have no data.

The types of the tensors are those that llama.cpp's quantisation chooses. ``test_plans.py`` compares the sizes of the
files that follow from them with those in the model cards.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from exo.worker.runner_common.model_files.gguf import STRING, TENSOR_TYPES, UINT32, GgufField, GgufHeader, GgufTensor

F32, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, MXFP4 = 0, 6, 7, 8, 12, 13, 14, 39
"""Numbers of ggml's types."""
_NARROW = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
"""The types in place of those whose blocks are longer than a row."""
_UINT8 = 0
Keys = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model. ``keys`` are further ones of its architecture, in a GGUF file's words."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context: int
    tied: bool = False
    experts: int = 0
    """Of ``feed_forward`` each."""
    keys: Keys = field(default_factory=dict[str, int])
    kind: Literal["Q4_K_M", "Q8_0", "MXFP4"] = "Q4_K_M"

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim


_QWEN7 = Shape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, 32768)
_QWEN06 = Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, tied=True)
_LLAMA8 = Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072)
_EXPERTS = {"expert_used_count": 8, "expert_feed_forward_length": 768}


SHAPES: dict[str, Shape] = {
    "Qwen/Qwen2.5-0.5B-Instruct": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768),
    "Qwen/Qwen2.5-7B-Instruct": _QWEN7,
    "Qwen/Qwen2.5-Coder-7B-Instruct": _QWEN7,
    "Qwen/Qwen3-0.6B": _QWEN06,
    "Qwen/Qwen3-4B": Shape("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, 40960, tied=True),
    "Qwen/Qwen3-8B": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960),
    "Qwen/Qwen3-14B": Shape("qwen3", 40, 5120, 40, 8, 128, 17408, 151936, 40960),
    "Qwen/Qwen3-32B": Shape("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, 40960),
    "Qwen/Qwen3-30B-A3B": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 151936, 40960, experts=128, keys=_EXPERTS),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": Shape(
        "qwen3moe", 48, 2048, 32, 4, 128, 768, 151936, 262144, experts=128, keys=_EXPERTS
    ),
    "Qwen/Qwen3-Embedding-0.6B": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151669, 32768, tied=True, kind="Q8_0"),
    "Qwen/Qwen3.5-9B": Shape(
        "qwen35", 32, 4096, 16, 4, 256, 12288, 248320, 262144,
        keys={
            "full_attention_interval": 4, "ssm.conv_kernel": 4, "ssm.inner_size": 4096, "ssm.state_size": 128,
            "ssm.group_count": 16, "ssm.time_step_rank": 32,
        },
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA8,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": replace(_QWEN7, context=131072),
    "google/gemma-3-270m": Shape(
        "gemma3", 18, 640, 4, 1, 256, 2048, 262144, 32768, tied=True, keys={"attention.sliding_window": 512}
    ),
    "google/gemma-3-1b-it": Shape(
        "gemma3", 26, 1152, 4, 1, 256, 6912, 262144, 32768, tied=True, keys={"attention.sliding_window": 512}
    ),
    "google/gemma-3-4b-it": Shape(
        "gemma3", 34, 2560, 8, 4, 256, 10240, 262208, 131072, tied=True, keys={"attention.sliding_window": 1024}
    ),
    "google/gemma-3-12b-it": Shape(
        "gemma3", 48, 3840, 16, 8, 256, 15360, 262208, 131072, tied=True, keys={"attention.sliding_window": 1024}
    ),
    "google/gemma-3-27b-it": Shape(
        "gemma3", 62, 5376, 32, 16, 128, 21504, 262208, 131072, tied=True, keys={"attention.sliding_window": 1024}
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA8,
    "meta-llama/Llama-3.2-1B-Instruct": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, tied=True),
    "meta-llama/Llama-3.2-3B-Instruct": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 131072, tied=True),
    "meta-llama/Llama-3.3-70B-Instruct": Shape("llama", 80, 8192, 64, 8, 128, 28672, 128256, 131072),
    "microsoft/phi-4": Shape("phi3", 40, 5120, 40, 10, 128, 17920, 100352, 16384),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape("llama", 32, 4096, 32, 8, 128, 14336, 32768, 32768),
    "mistralai/Mistral-Small-24B-Instruct-2501": Shape("llama", 40, 5120, 32, 8, 128, 32768, 131072, 32768),
    "nomic-ai/nomic-embed-text-v1.5": Shape(
        "nomic-bert", 12, 768, 12, 12, 64, 3072, 30522, 2048, tied=True, kind="Q8_0", keys={"attention.causal": 0}
    ),
    "openai/gpt-oss-20b": Shape(
        "gpt-oss", 24, 2880, 64, 8, 64, 2880, 201088, 131072, experts=32, kind="MXFP4",
        keys={"attention.sliding_window": 128, "expert_used_count": 4, "expert_feed_forward_length": 2880},
    ),
    "zai-org/GLM-4.7-Flash": Shape(
        "deepseek2", 47, 2048, 20, 1, 576, 1536, 154880, 202752, experts=64,
        keys={
            "leading_dense_block_count": 1, "expert_used_count": 4, "expert_shared_count": 1,
            "expert_feed_forward_length": 1536, "attention.q_lora_rank": 768, "attention.kv_lora_rank": 512,
            "attention.value_length": 512, "attention.key_length_mla": 256, "attention.value_length_mla": 256,
        },
    ),
}  # fmt: skip
"""By model id."""
_PROJECTORS = {
    "google/gemma-3-4b-it": ("gemma3", 896, 14, 851_251_104),
    "google/gemma-3-12b-it": ("gemma3", 896, 14, 854_200_224),
    "google/gemma-3-27b-it": ("gemma3", 896, 14, 857_739_168),
    "Qwen/Qwen3.5-9B": ("qwen3vl_merger", 768, 16, 918_166_080),
}
"""Type, pixels of a side and of a patch, and bytes of the files that the built-in model cards name."""
_DENSE = {"zai-org/GLM-4.7-Flash": 10240}


def header(model_id: str) -> GgufHeader:
    """The header of a built-in model's file."""
    shape = SHAPES[model_id]
    numbers = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "feed_forward_length": _DENSE.get(model_id, shape.feed_forward),
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "expert_count": shape.experts,
        **shape.keys,
    }
    text = shape.architecture.encode()
    data = struct.pack("<Q", len(text)) + text
    fields = {"general.architecture": GgufField(STRING, None, 0)}
    for key, number in numbers.items():
        fields[f"{shape.architecture}.{key}"] = GgufField(UINT32, None, len(data))
        data += struct.pack("<I", number)
    fields["tokenizer.ggml.tokens"] = GgufField(_UINT8, shape.vocabulary, len(data))
    return GgufHeader(fields, tuple(_stored(shape, _DENSE.get(model_id, shape.feed_forward))), data)


def projector(model_id: str) -> GgufHeader | None:
    """The header of a model's projector; None without one. One tensor has the bytes of all."""
    if model_id not in _PROJECTORS:
        return None
    kind, side, patch, size = _PROJECTORS[model_id]
    numbers = {
        "image_size": side, "patch_size": patch, "embedding_length": 1152, "feed_forward_length": 4304,
        "attention.head_count": 16,
    }  # fmt: skip
    data = struct.pack("<Q", len(kind)) + kind.encode()
    fields = {"clip.projector_type": GgufField(STRING, None, 0)}
    for key, number in numbers.items():
        fields[f"clip.vision.{key}"] = GgufField(UINT32, None, len(data))
        data += struct.pack("<I", number)
    return GgufHeader(fields, (GgufTensor("v.all", (size,), 0, 0, size),), data)


def _stored(shape: Shape, dense: int) -> Iterator[GgufTensor]:
    for name, sizes in _tensors(shape, dense):
        kind = _kind(shape, name, sizes)
        block, size = TENSOR_TYPES[kind]
        yield GgufTensor(name, sizes, kind, 0, math.prod(sizes) // block * size)


def _kind(shape: Shape, name: str, sizes: tuple[int, ...]) -> int:
    """The type that llama.cpp's quantisation gives a tensor."""
    if len(sizes) == 1 or ".ffn_gate_inp." in name or ".bias" in name or "ssm_conv1d" in name:
        return F32
    if shape.kind != "Q4_K_M":
        return MXFP4 if shape.kind == "MXFP4" and "_exps." in name else Q8_0
    kind = Q4_K
    if name == "output.weight" or (name == "token_embd.weight" and shape.tied):
        kind = Q6_K
    elif ".attn_v" in name and shape.layers == 80:
        kind = Q6_K if _more_bits(name, shape) else Q5_K
    elif (".attn_v" in name or ".ffn_down" in name) and _more_bits(name, shape):
        kind = Q6_K
    elif ".attn_qkv." in name:
        kind = Q5_K
    return _NARROW[kind] if sizes[0] % 256 else kind


def _more_bits(name: str, shape: Shape) -> bool:
    layer, eighth = int(name.split(".")[1]), shape.layers // 8
    return layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2


def _tensors(shape: Shape, dense: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes, the innermost one first."""
    hidden = shape.hidden
    yield "token_embd.weight", (hidden, shape.vocabulary)
    if not shape.tied:
        yield "output.weight", (hidden, shape.vocabulary)
    yield "output_norm.weight", (hidden,)
    for layer in range(shape.layers):
        parts = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        parts |= _attention(shape, layer) | _feed_forward(shape, layer, dense)
        for name, sizes in parts.items():
            yield f"blk.{layer}.{name}", sizes


def _attention(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, query, key, keys = shape.hidden, shape.query, shape.key, shape.keys
    separate = {
        "attn_q.weight": (hidden, query), "attn_k.weight": (hidden, key), "attn_v.weight": (hidden, key),
        "attn_output.weight": (query, hidden),
    }  # fmt: skip
    fused = {"attn_qkv.weight": (hidden, query + 2 * key), "attn_output.weight": (query, hidden)}
    match shape.architecture:
        case "qwen35" if (layer + 1) % keys["full_attention_interval"]:
            inner, groups = keys["ssm.inner_size"], 2 * keys["ssm.group_count"] * keys["ssm.state_size"]
            rank = keys["ssm.time_step_rank"]
            return {
                "attn_qkv.weight": (hidden, inner + groups), "attn_gate.weight": (hidden, inner),
                "ssm_conv1d.weight": (keys["ssm.conv_kernel"], inner + groups), "ssm_out.weight": (inner, hidden),
                "ssm_alpha.weight": (hidden, rank), "ssm_beta.weight": (hidden, rank), "ssm_a": (rank,),
            }  # fmt: skip
        case "qwen35":
            return {**separate, "attn_q.weight": (hidden, 2 * query)}
        case "deepseek2":
            q_rank, kv_rank, nope = keys["attention.q_lora_rank"], keys["attention.kv_lora_rank"], 192
            value = keys["attention.value_length_mla"]
            return {
                "attn_q_a.weight": (hidden, q_rank),
                "attn_q_b.weight": (q_rank, shape.heads * keys["attention.key_length_mla"]),
                "attn_kv_a_mqa.weight": (hidden, shape.head_dim),
                "attn_k_b.weight": (nope, kv_rank, shape.heads), "attn_v_b.weight": (kv_rank, value, shape.heads),
                "attn_output.weight": (shape.heads * value, hidden),
            }  # fmt: skip
        case "phi3" | "nomic-bert":
            return fused
        case "gpt-oss" | "qwen2":
            return {**separate, "attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
        case _:
            return separate


def _feed_forward(shape: Shape, layer: int, dense: int) -> dict[str, tuple[int, ...]]:
    hidden, wide, experts = shape.hidden, shape.feed_forward, shape.experts
    if shape.architecture == "phi3":
        return {"ffn_up.weight": (hidden, 2 * wide), "ffn_down.weight": (wide, hidden)}
    if not experts or layer < shape.keys.get("leading_dense_block_count", 0):
        return _gated("", hidden, dense)
    routed = {name: (*sizes, experts) for name, sizes in _gated("_exps", hidden, wide).items()}
    shared = _gated("_shexp", hidden, wide) if shape.keys.get("expert_shared_count") else {}
    return {**routed, **shared, "ffn_gate_inp.weight": (hidden, experts)}


def _gated(kind: str, hidden: int, wide: int) -> dict[str, tuple[int, ...]]:
    return {
        f"ffn_gate{kind}.weight": (hidden, wide), f"ffn_up{kind}.weight": (hidden, wide),
        f"ffn_down{kind}.weight": (wide, hidden),
    }  # fmt: skip
