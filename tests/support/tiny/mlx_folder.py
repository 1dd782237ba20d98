"""Writes a tiny model as a folder in Hugging Face's layout, which MLX loads."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from tests.support.tiny.shape import Shape
from tests.support.tiny.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS, Tokenizer
from tests.support.tiny.weights import make_weights

Json = dict[str, object]

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def write_mlx(folder: Path, shape: Shape) -> None:
    """Write `shape` into `folder`, which is made if absent. Equal shapes give equal bytes.

    Raises ValueError for a quantised `shape`: this layout has its own quantisations.
    """
    if shape.quantised:
        raise ValueError(f"dtype is {shape.dtype!r}, expected F32 or F16 for an MLX folder")
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.float16 if shape.dtype == "F16" else np.float32
    tensors = {
        name: tensor.astype(stored) if tensor.ndim == 2 else tensor for name, tensor in make_weights(shape).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    tokenizer = Tokenizer.of_size(shape.vocabulary)
    end_of_turn, end_of_text = tokenizer.id_of(END_OF_TURN), tokenizer.id_of(END_OF_TEXT)
    _write_json(folder / "config.json", _config(shape) | {"eos_token_id": end_of_turn, "bos_token_id": end_of_text})
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": [end_of_turn, end_of_text], "bos_token_id": end_of_text, "pad_token_id": end_of_text},
    )
    _write_json(folder / "tokenizer.json", _tokenizer(tokenizer))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _config(shape: Shape) -> Json:
    config: Json = {
        "architectures": [_CLASSES[shape.architecture]],
        "model_type": "gemma3_text" if shape.architecture == "gemma3" else shape.architecture,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layer_count,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float16" if shape.dtype == "F16" else "float32",
    }
    if shape.architecture != "gemma3":
        return config | {"hidden_act": "silu", "attention_bias": shape.has_qkv_bias}
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.head_dim,
        "rope_local_base_freq": shape.rope_base_local,
        "sliding_window": shape.sliding_window,
        "sliding_window_pattern": shape.sliding_window_pattern,
    }


def _tokenizer(tokenizer: Tokenizer) -> Json:
    byte_level: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": tokenizer.id_of(text),
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text in SPECIAL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token.text: number for number, token in enumerate(tokenizer.tokens) if not token.special},
            "merges": [list(merge) for merge in tokenizer.merges],
        },
    }


def _tokenizer_config(shape: Shape) -> Json:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [text for text in SPECIAL_TOKENS if text != END_OF_TEXT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context_length,
        "chat_template": CHAT_TEMPLATE,
    }
