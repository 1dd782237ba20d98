"""Writes a tiny Qwen3 with a mixture of experts as a GGUF file."""

from pathlib import Path

import gguf
import numpy as np

from tests.support.tiny.gguf_file import BLOCK_NAMES, GLOBAL_NAMES, add_tokenizer
from tests.support.tiny.shape import Shape
from tests.support.tiny.tokenizer import Tokenizer
from tests.support.tiny.weights import make_weights

USED = 2
"""The number of experts that a token is computed with."""
_NAMES = {**BLOCK_NAMES, "post_attention_layernorm": "ffn_norm"}


def write_experts(path: Path, shape: Shape, experts: int = 4) -> None:
    """Write a model to `path` whose layers are those of `shape`, a Qwen3, with so many experts in each."""
    assert shape.architecture == "qwen3"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name("tiny qwen3moe")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(USED * shape.feed_forward)
    writer.add_expert_feed_forward_length(shape.feed_forward)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(USED)
    writer.add_block_count(shape.layer_count)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    add_tokenizer(writer, Tokenizer.of_size(shape.vocabulary))
    for name, tensor in make_weights(shape).items():
        if name in GLOBAL_NAMES:
            writer.add_tensor(GLOBAL_NAMES[name], tensor)
            continue
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        if not module.startswith("mlp."):
            writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight", tensor)
            continue
        # Every expert has another order of the same neurons' inputs, so that each gives a result of its own.
        turned = [np.roll(tensor, 7 * expert, axis=0 if module == "mlp.down_proj" else 1) for expert in range(experts)]
        for each in turned:
            if module == "mlp.down_proj":
                each[0] = 0  # as in the other blocks, see ``weights``
        writer.add_tensor(f"blk.{layer}.{_NAMES[module]}_exps.weight", np.stack(turned))
    random = np.random.default_rng(shape.seed)
    for layer in range(shape.layer_count):
        gate = random.standard_normal((experts, shape.hidden), np.float32) / np.float32(np.sqrt(shape.hidden))
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", gate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
