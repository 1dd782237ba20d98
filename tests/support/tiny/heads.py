"""Writes a tiny GLM-4.5 as a GGUF file: a layer, and a head that guesses the token after the next one."""

from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from tests.support.tiny.gguf_file import BLOCK_NAMES, GLOBAL_NAMES, add_tokenizer
from tests.support.tiny.shape import Shape
from tests.support.tiny.tokenizer import Tokenizer
from tests.support.tiny.weights import Tensor, make_weights

Head = Literal["state", "token", "partly", "random", "none"]
"""What the head guesses from: the state of a token, or the token that follows; "partly" is wrong after every fourth
token. With "random", the layer and the head have random weights. With "none", the file names a head that it lacks."""
CYCLE = 60
"""The number of tokens that follow each other in turn. Each has a channel of its own."""
_SURE = 1.2
_FIRST = 40
"""The first token of the cycle, a printable character."""
_SHAPE = Shape(architecture="qwen3", layers=2)
"""The shape of both layers, without norms of queries and keys."""


def write_with_head(path: Path, head: Head) -> None:
    """Write the model to `path`."""
    writer = gguf.GGUFWriter(path, "glm4moe")
    _add_sizes(writer)
    weights = make_weights(_SHAPE)
    if head != "random":
        _cycle(weights)
    for name, tensor in weights.items():
        if name in GLOBAL_NAMES:
            writer.add_tensor(GLOBAL_NAMES[name], tensor)
            continue
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        if layer == "1" and (head == "none" or module.startswith("mlp.")):
            continue
        if not module.endswith(("q_norm", "k_norm")):
            names = {**BLOCK_NAMES, "post_attention_layernorm": "post_attention_norm"}
            writer.add_tensor(f"blk.{layer}.{names[module]}.weight", tensor)
    if head != "none":
        for name, tensor in _head(head, weights["lm_head.weight"]).items():
            writer.add_tensor(f"blk.1.{name}.weight", tensor)
        writer.add_tensor("blk.1.exp_probs_b.bias", np.zeros(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter) -> None:
    writer.add_name("tiny glm4moe")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(_SHAPE.vocabulary)
    writer.add_context_length(_SHAPE.context_length)
    writer.add_embedding_length(_SHAPE.hidden)
    writer.add_feed_forward_length(_SHAPE.feed_forward)
    writer.add_block_count(2)
    writer.add_nextn_predict_layers(1)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(_SHAPE.feed_forward)
    writer.add_head_count(_SHAPE.heads)
    writer.add_head_count_kv(_SHAPE.kv_heads)
    writer.add_key_length(_SHAPE.head_dim)
    writer.add_value_length(_SHAPE.head_dim)
    writer.add_rope_dimension_count(_SHAPE.head_dim)
    writer.add_rope_freq_base(_SHAPE.rope_base)
    writer.add_layer_norm_rms_eps(_SHAPE.norm_eps)
    add_tokenizer(writer, Tokenizer.of_size(_SHAPE.vocabulary))


def _cycle(weights: dict[str, Tensor]) -> None:
    """Has each token of the cycle be followed by the next one, and any other by the first. No block adds anything."""
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor[:] = 0
    weights["model.norm.weight"][:] = 1
    embedding, output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:], output[:] = 0, 0
    embedding[:, 0] = 1
    output[_FIRST, 0] = _SURE
    for at in range(CYCLE):
        embedding[_FIRST + at] = np.eye(1, _SHAPE.hidden, at + 1)
        output[_FIRST + (at + 1) % CYCLE, at + 1] = _SURE


def _head(head: Head, output: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of the head that the layers do not have."""
    hidden, inner = _SHAPE.hidden, _SHAPE.feed_forward
    random = np.random.default_rng(7)

    def matrix(*shape: int) -> Tensor:
        drawn = random.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        return drawn if head == "random" else np.zeros_like(drawn)

    joined, own_output = matrix(hidden, 2 * hidden), output.copy()
    if head == "state":  # channel n of a token becomes that of the token after it
        joined[1, hidden] = 1
        for at in range(CYCLE):
            joined[(at + 1) % CYCLE + 1, hidden + at + 1] = 1
    elif head != "random":
        joined[:, :hidden] = np.eye(hidden)
    if head == "partly":
        own_output[:, 4 : CYCLE + 1 : 4] = 0
    ones = np.ones(hidden, np.float32)
    return {
        "nextn.eh_proj": joined,
        "nextn.enorm": ones,
        "nextn.hnorm": ones,
        "nextn.shared_head_head": own_output,
        "nextn.shared_head_norm": ones,
        "ffn_gate_inp": matrix(2, hidden),
        "ffn_gate_exps": matrix(2, inner, hidden),
        "ffn_up_exps": matrix(2, inner, hidden),
        "ffn_down_exps": matrix(2, hidden, inner),
        "ffn_gate_shexp": matrix(inner, hidden),
        "ffn_up_shexp": matrix(inner, hidden),
        "ffn_down_shexp": matrix(hidden, inner),
    }
