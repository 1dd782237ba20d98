"""Folders that cannot be converted are refused by name, and nothing is left behind."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import JsonValue
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from exo.convert import convert
from tests.support.converted import change_json, config, refuse, weights
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.shape import Architecture

Change = Callable[[Path], object]
"""Something done to a good folder."""

ZEROS = np.zeros(64, np.float32)
Q_PROJ = "model__layers__0__self_attn__q_proj__weight"
AFFINE: JsonValue = {"group_size": 64, "bits": 4}
WORDS: JsonValue = {"type": "Whitespace"}
NO_FILE = "model.safetensors: is not a safetensors file"


def settings(**keys: JsonValue) -> Change:
    return lambda folder: change_json(folder / "config.json", **keys)


def tokenizer(**keys: JsonValue) -> Change:
    return lambda folder: change_json(folder / "tokenizer.json", **keys)


def model(**keys: JsonValue) -> Change:
    """Of tokenizer.json."""
    return lambda folder: tokenizer(model=config(folder, "tokenizer.json")["model"] | keys)(folder)


def added_token(**keys: JsonValue) -> Change:
    def change(folder: Path) -> None:
        first, *others = config(folder, "tokenizer.json")["added_tokens"]
        tokenizer(added_tokens=[first | keys, *others])(folder)

    return change


def tensors(**changes: NDArray[Any] | None) -> Change:
    """With __ for each dot in a name; None removes a tensor."""

    def change(folder: Path) -> None:
        new = weights(folder) | {name.replace("__", "."): array for name, array in changes.items()}
        save_file({name: array for name, array in new.items() if array is not None}, folder / "model.safetensors")

    return change


def packed(quantization: JsonValue) -> Change:
    """A matrix as MLX packs it, without its scales."""

    def change(folder: Path) -> None:
        tensors(**{Q_PROJ: np.zeros((64, 8), np.uint32)})(folder)
        settings(quantization=quantization)(folder)

    return change


def index(file: str) -> Change:
    content = json.dumps({"weight_map": {"a": file}}).encode()
    return write("model.safetensors.index.json", content)


def write(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("llama", settings(model_type="mamba"), "config.json: model_type: 'mamba' cannot be converted; accepted: l"),
        ("llama", settings(hidden_size=0), "config.json: has hidden_size = 0, expected a whole number"),
        ("llama", settings(hidden_size="64"), "config.json: has hidden_size = '64', expected a whole number"),
        ("llama", settings(num_hidden_layers=9_000), "config.json: num_hidden_layers: is 9000, but there are"),
        ("llama", settings(num_hidden_layers=1), "model.layers.1.input_layernorm.weight: no such tensor is known in a"),
        ("llama", settings(attention_bias=True), "config.json: attention_bias: is True, expected false for llama"),
        ("llama", settings(mlp_bias=True), "config.json: mlp_bias: Input should be False"),
        ("llama", settings(hidden_act="gelu"), "config.json: hidden_act: is 'gelu', expected silu"),
        ("llama", settings(sliding_window=512), "config.json: sliding_window: is 512, expected null for llama"),
        ("llama", settings(rope_scaling={"type": "yarn", "factor": 4.0}), "config.json: rope_scaling: is 'yarn', exp"),
        ("qwen3", settings(rope_scaling={"type": "llama3", "factor": 4.0}), "config.json: rope_scaling: is llama3, w"),
        ("qwen2", settings(use_sliding_window=True), "config.json: use_sliding_window: Input should be False"),
        ("qwen3", settings(layer_types=["full_attention"]), "config.json: layer_types: is ['full_a"),
        ("gemma3", settings(sliding_window=None), "config.json: sliding_window: is None, expected a number of tokens"),
        ("gemma3", settings(sliding_window_pattern=2), "config.json: sliding_window_pattern: is 2, expected 6"),
        ("gemma3", settings(query_pre_attn_scalar=17), "config.json: query_pre_attn_scalar: is 17.0, expected 16, wh"),
        ("gemma3", settings(final_logit_softcapping=30.0), "config.json: final_logit_softcapping: Input should be nu"),
        ("llama", settings(quantization_config={"quant_method": "gptq"}), "config.json: quantization_config: only MLX"),
        ("llama", settings(quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"}), "config.json: quantization."),
        ("llama", settings(bos_token_id=320), "config.json: bos_token_id: is 320, but there are 320 tokens"),
        ("llama", write("config.json", b"{"), "config.json: is not a JSON object: Invalid JSON"),
        ("llama", write("config.json", b"[" * 100_000), "config.json: is not a JSON object: Invalid JSON"),
        ("llama", tensors(lm_head__weight=None), "lm_head.weight: this tensor of a llama model is missing"),
        ("llama", tensors(extra=ZEROS), "extra: no such tensor is known in a llama model"),
        ("llama", tensors(model__norm__weight=ZEROS[:32]), "model.norm.weight: has shape 32, expected 64"),
        ("llama", tensors(model__norm__weight=ZEROS.astype(np.int64)), "model.norm.weight: is stored as I64; accepted"),
        ("llama", packed(None), "model.layers.0.self_attn.q_proj.weight: is stored as U32, but config.json has"),
        ("llama", packed(AFFINE), "model.layers.0.self_attn.q_proj.scales: is"),
        ("qwen2", tensors(lm_head__weight=np.ones((320, 64), np.float32)), "lm_head.weight: differs from model.embed"),
        ("llama", index("../model.safetensors"), "model.safetensors.index.json: lists '../model"),
        ("llama", index("other.safetensors"), "model.safetensors.index.json: lists other.s"),
        ("llama", write("model.safetensors", bytes(7)), "model.safetensors: is not a safetensors file: it c"),
        ("llama", write("model.safetensors", b"\xff" * 9), "model.safetensors: is not a safetensors file: it c"),
        ("llama", model(type="Unigram"), "tokenizer.json: model.type: Input should be 'BPE'"),
        ("llama", model(dropout=0.1), "tokenizer.json: model.dropout: Input should be 0"),
        ("llama", model(ignore_merges=True), "tokenizer.json: ignore_merges: expected false for gpt-2"),
        ("llama", model(byte_fallback=True), "tokenizer.json: merges: "),
        ("llama", model(merges=["ab"]), "tokenizer.json: merges: holds 'ab', expected two tokens"),
        ("llama", model(merges=[["a", "bc"]]), "tokenizer.json: merges: 'a' and 'bc' need 'bc', which is no token"),
        (
            "llama",
            model(merges=[["a b", "c"]], vocab={"a b": 0, "c": 1, "a bc": 2}),
            "tokenizer.json: merges: ('a b', 'c') has a spac",
        ),
        ("llama", model(vocab={"a": 0, "b": 0}), "tokenizer.json: the tokens 'a' and 'b' have the same "),
        ("llama", model(vocab={"a": 320}), "tokenizer.json: has the token id 320, but config.json's voc"),
        ("llama", tokenizer(normalizer={"type": "Lowercase"}), "tokenizer.json: normalizer: is {'type': 'Lowercas"),
        ("llama", tokenizer(pre_tokenizer=WORDS), "tokenizer.json: pre_tokenizer: is none that l"),
        ("llama", added_token(lstrip=True), "tokenizer.json: added_tokens.0.lstrip: Input should be False"),
        ("llama", added_token(id=0, content="b"), "tokenizer.json: 'b' is two tokens, which a GGUF file cannot say"),
    ],
)
def test_a_folder_that_cannot_be_said_otherwise(
    tmp_path: Path, architecture: Architecture, change: Change, message: str
) -> None:
    write_mlx(tmp_path / "model", Shape(architecture))
    change(tmp_path / "model")
    refuse(tmp_path / "model", tmp_path / "out.gguf", message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}, f"{NO_FILE}: t is F32 of shape (2,) at bytes 0 to 9"),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            f"{NO_FILE}: t is F32 of shape (2,) at bytes 4 to 12",
        ),
        (
            {"dtype": "F32", "shape": [2**62, 2], "data_offsets": [0, 8]},
            f"{NO_FILE}: t is F32 of shape (4611686018427387904, 2) at",
        ),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, f"{NO_FILE}: its header is broken: t"),
        ({"dtype": "F32", "shape": [1, 1, 2], "data_offsets": [0, 8]}, "t: has shape [1, 1, 2], expected a vector"),
        ({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}, "t: is stored as F8_E4M3; accepted: F32"),
        ({"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}, f"{NO_FILE}: its header is broken: t"),
        (7, f"{NO_FILE}: its header is broken: t"),
        ({"dtype": "F32"}, f"{NO_FILE}: its header is broken: t.shape: Field required"),
        (
            {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "model.safetensors: has 77 bytes, but its tensors end at byte 73",
        ),
    ],
)
def test_a_broken_safetensors_file(tmp_path: Path, entry: object, message: str) -> None:
    write_mlx(tmp_path / "model", Shape())
    text = json.dumps({"t": entry}).encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refuse(tmp_path / "model", tmp_path / "out.gguf", message)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    (tmp_path / "model" / "config.json").unlink()
    refuse(tmp_path / "model", tmp_path / "out.gguf", f"{tmp_path / 'model' / 'config.json'}: no such file")


def test_a_folder_with_a_file_missing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_mlx(folder, Shape())
    (folder / "tokenizer_config.json").unlink()
    missing = f"{folder / 'tokenizer_config.json'}: no such file; a model folder has"
    refuse(folder, tmp_path / "out.gguf", missing)
    (folder / "tokenizer.json").unlink()
    refuse(folder, tmp_path / "out.gguf", f"model: {folder} has no tokenizer: tokenizer.json is missing")


def test_weights_in_a_format_that_can_run_code(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    expected = f"model: {tmp_path / 'model'} has no model*.safetensors; pytorch_model.bin is a pickle, which may run"
    refuse(tmp_path / "model", tmp_path / "out.gguf", expected)


def test_code_beside_a_model_is_not_copied(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    change_json(tmp_path / "model" / "config.json", auto_map={"AutoModel": "code.Model"})
    convert(tmp_path / "model", tmp_path / "m.gguf", to="gguf", dtype="f32")
    convert(tmp_path / "m.gguf", tmp_path / "back", to="mlx", dtype="f32")
    assert "auto_map" not in config(tmp_path / "back")
    assert {path.suffix for path in (tmp_path / "back").iterdir()} == {".json", ".safetensors"}
