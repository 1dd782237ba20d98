"""Writes a tiny model as a GGUF file for llama.cpp."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.support.tiny.shape import Dtype, Shape
from tests.support.tiny.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, Tokenizer
from tests.support.tiny.weights import Tensor, make_weights

GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FEED_FORWARD_NORMS = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
Stored = tuple[str, NDArray[np.generic], gguf.GGMLQuantizationType]
"""A tensor's name in the file, its values or blocks, and their type."""


def write_gguf(path: Path, shape: Shape) -> None:
    """Write `shape` to `path`, replacing what is there. Equal shapes give equal bytes."""
    write_tensors(path, shape, Tokenizer.of_size(shape.vocabulary), make_weights(shape))


def write_flat_gguf(path: Path, seed: int = 0) -> None:
    """Write a Qwen2-VL, which is a Qwen2 whose rotary embeddings have more than one dimension (M-RoPE)."""
    shape = Shape("qwen2", seed=seed)
    writer = gguf.GGUFWriter(path, "qwen2vl")
    writer.add_rope_dimension_sections([4, 2, 2, 0])
    weights = make_weights(shape).items()
    _write(writer, shape, Tokenizer.of_size(shape.vocabulary), (_stored(shape, *each) for each in weights))


def write_tensors(path: Path, shape: Shape, tokenizer: Tokenizer, weights: Mapping[str, Tensor]) -> None:
    """Write a model of this shape with a tokenizer and weights of its own."""
    write_stored(path, shape, tokenizer, (_stored(shape, name, tensor) for name, tensor in weights.items()))


def write_stored(path: Path, shape: Shape, tokenizer: Tokenizer, tensors: Iterable[Stored]) -> None:
    """Write a model of this shape whose tensors are already as the file has them."""
    _write(gguf.GGUFWriter(path, shape.architecture), shape, tokenizer, tensors)


def _write(writer: gguf.GGUFWriter, shape: Shape, tokenizer: Tokenizer, tensors: Iterable[Stored]) -> None:
    _add_sizes(writer, shape)
    add_tokenizer(writer, tokenizer)
    for name, stored, quantisation in tensors:
        writer.add_tensor(name, stored, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"tiny {shape.architecture} {shape.seed}")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[shape.dtype]])
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_block_count(shape.layer_count)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    if shape.architecture == "gemma3":
        writer.add_sliding_window(shape.sliding_window)
        writer.add_rope_freq_base_swa(shape.rope_base_local)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Write a tokenizer's metadata."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token.text for token in tokenizer.tokens])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token.special else gguf.TokenType.NORMAL for token in tokenizer.tokens]
    )
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.id_of(END_OF_TEXT))
    writer.add_eos_token_id(tokenizer.id_of(END_OF_TURN))
    writer.add_pad_token_id(tokenizer.id_of(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _stored(shape: Shape, name: str, tensor: Tensor) -> Stored:
    converted = _convert(shape, name, tensor)
    quantisation = gguf.GGMLQuantizationType[_stored_dtype(shape, name, converted)]
    return _gguf_name(shape, name), gguf.quants.quantize(converted, quantisation), quantisation


def _stored_dtype(shape: Shape, name: str, tensor: Tensor) -> Dtype:
    """Embedding and output stay F16: their large channel 0 would leave its block of Q8_0 or Q4_0 no resolution."""
    if tensor.ndim == 1:
        return "F32"
    return "F16" if shape.quantised and name in GLOBAL_NAMES else shape.dtype


def _gguf_name(shape: Shape, name: str) -> str:
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, _, layer, module = name.split(".", 3)
    module, kind = module.rsplit(".", 1)
    norms = _GEMMA_NORMS if shape.architecture == "gemma3" else _FEED_FORWARD_NORMS
    return f"blk.{layer}.{(BLOCK_NAMES | norms)[module]}.{kind}"


def _convert(shape: Shape, name: str, tensor: Tensor) -> Tensor:
    """Converts from Hugging Face's conventions to llama.cpp's."""
    if shape.architecture == "gemma3" and tensor.ndim == 1:
        return tensor + np.float32(1)
    if shape.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return _interleave_pairs(tensor, shape.head_dim)
    return tensor


def _interleave_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (first halves, second halves) of the rotated pairs to pair after pair.

    llama.cpp's llama rotates neighbouring rows; Hugging Face's rotates rows half a head apart.
    """
    heads = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(tensor.shape))
