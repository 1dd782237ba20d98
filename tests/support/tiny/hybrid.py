"""Writes a tiny LFM2 as a GGUF file: layers with a recurrent state and, by turns, with attention."""

from pathlib import Path

import gguf
import numpy as np

from tests.support.tiny.gguf_file import BLOCK_NAMES, GLOBAL_NAMES, add_tokenizer
from tests.support.tiny.shape import Shape
from tests.support.tiny.tokenizer import Tokenizer
from tests.support.tiny.weights import make_weights

_SHAPE = Shape(architecture="qwen3", layers=4)
"""The shape of the layers with attention, whose parts LFM2 has too."""
_KERNEL = 4
_NAMES = {**BLOCK_NAMES, "post_attention_layernorm": "ffn_norm"}
_GLOBAL_NAMES = {**GLOBAL_NAMES, "model.norm.weight": "token_embd_norm.weight"}


def write_hybrid(path: Path, window: int | None = None) -> None:
    """Write the model to `path`. With ``window``, its attention is limited to as many tokens."""
    writer = gguf.GGUFWriter(path, "lfm2")
    tokenizer = Tokenizer.of_size(_SHAPE.vocabulary)
    writer.add_name("tiny lfm2")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(_SHAPE.vocabulary)
    writer.add_context_length(_SHAPE.context_length)
    writer.add_embedding_length(_SHAPE.hidden)
    writer.add_feed_forward_length(_SHAPE.feed_forward)
    writer.add_block_count(_SHAPE.layer_count)
    writer.add_head_count(_SHAPE.heads)
    writer.add_head_count_kv([_SHAPE.kv_heads * _attends(layer) for layer in range(_SHAPE.layer_count)])
    writer.add_rope_freq_base(_SHAPE.rope_base)
    writer.add_layer_norm_rms_eps(_SHAPE.norm_eps)
    writer.add_shortconv_l_cache(_KERNEL)
    if window is not None:
        writer.add_sliding_window(window)
    add_tokenizer(writer, tokenizer)
    for name, tensor in make_weights(_SHAPE).items():
        if name in _GLOBAL_NAMES:
            writer.add_tensor(_GLOBAL_NAMES[name], tensor)
            continue
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        if _attends(int(layer)) or not module.startswith("self_attn."):
            writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight", tensor)
    random = np.random.default_rng(0)
    for layer in range(_SHAPE.layer_count):
        if not _attends(layer):
            shapes = {"conv": (64, _KERNEL), "in_proj": (3 * 64, 64), "out_proj": (64, 64)}
            for part, (rows, columns) in shapes.items():
                tensor = random.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))
                if part == "out_proj":
                    tensor[0] = 0  # as in the other blocks, see ``weights``
                writer.add_tensor(f"blk.{layer}.shortconv.{part}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _attends(layer: int) -> bool:
    return layer % 2 == 1
