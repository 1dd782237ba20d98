"""Models that are laid out or configured otherwise than the twins."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.convert import convert
from tests.support.converted import ask_both, bits, change_json, config, make_twins, question, weights
from tests.support.edited_gguf import Edit, decoded, rewrite
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.question import ask
from tests.support.tiny.shape import Architecture
from tests.support.tiny.texts import TEXTS


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twins(tmp_path_factory.mktemp("twins"))


def test_weights_in_several_files(twins: Path, tmp_path: Path) -> None:
    limit = 200_000
    convert(twins / "gemma3.gguf", tmp_path / "sharded", to="mlx", dtype="f32", shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) >= 5
    assert bits(weights(tmp_path / "sharded")) == bits(weights(twins / "gemma3"))
    index = config(tmp_path / "sharded", "model.safetensors.index.json")
    assert {name: file for file in files for name in load_file(tmp_path / "sharded" / file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == 4 * sum(array.size for array in weights(twins / "gemma3").values())
    convert(tmp_path / "sharded", tmp_path / "back.gguf", to="gguf", dtype="f32")
    assert bits(decoded(tmp_path / "back.gguf")) == bits(decoded(twins / "gemma3.gguf"))
    [answer] = ask("mlx_engine", [question(twins / "gemma3.gguf", tmp_path / "sharded", tmp_path)])
    assert len(answer["plain"]) == len(TEXTS)


@pytest.mark.parametrize("part", [1, 3])
def test_a_gguf_model_in_several_files_is_read_from_any(twins: Path, tmp_path: Path, part: int) -> None:
    rewrite(twins / "llama.gguf", tmp_path / "split.gguf", Edit(part_size=8))
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) == 3
    convert(parts[part - 1], tmp_path / "out", to="mlx", dtype="f32")
    assert bits(weights(tmp_path / "out")) == bits(weights(twins / "llama"))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("architecture", "scaling"), [("llama", LLAMA3), ("llama", LINEAR), ("qwen3", LINEAR), ("gemma3", LINEAR)]
)
def test_rotary_scaling(tmp_path: Path, architecture: Architecture, scaling: dict[str, Any]) -> None:
    """Both engines compute the same with it, something else without, and it comes back as it was."""
    write_mlx(tmp_path / "model", Shape(architecture))
    convert(tmp_path / "model", tmp_path / "plain.gguf", to="gguf", dtype="f32")
    change_json(tmp_path / "model" / "config.json", rope_scaling=scaling)
    convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype="f32")
    [said] = ask_both([question(tmp_path / "model.gguf", tmp_path / "model", tmp_path)])
    said.agree()
    ask("llama_engine", [question(tmp_path / "plain.gguf", tmp_path / "model", tmp_path)])
    assert np.abs(said.llama_logits - said.mlx_logits).max() > 0.1
    convert(tmp_path / "model.gguf", tmp_path / "back", to="mlx", dtype="f32")
    assert config(tmp_path / "back")["rope_scaling"] == scaling


def test_configurations_as_transformers_5_writes_them(twins: Path, tmp_path: Path) -> None:
    """Rotary bases and scaling in rope_parameters, the order of layers spelled out."""
    write_mlx(tmp_path / "model", Shape("gemma3"))
    written = config(tmp_path / "model")
    for key in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern"):
        del written[key]
    written["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    written["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(written))
    convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype="f32")
    convert(tmp_path / "model.gguf", tmp_path / "back", to="mlx", dtype="f32")
    convert(twins / "gemma3.gguf", tmp_path / "expected", to="mlx", dtype="f32")
    assert config(tmp_path / "back") == config(tmp_path / "expected")


def test_a_tied_output_matrix_that_repeats_the_embedding_is_written_once(twins: Path, tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape("qwen2"))
    tensors = weights(tmp_path / "model")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    report = convert(tmp_path / "model", tmp_path / "out.gguf", to="gguf", dtype="f32")
    assert report.left_out == ("lm_head.weight",)
    assert bits(decoded(tmp_path / "out.gguf")) == bits(decoded(twins / "qwen2.gguf"))


def test_a_matrix_with_more_rows_than_tokens(tmp_path: Path) -> None:
    """The rows without a token are padding in a GGUF file, and are padding no longer in the folder made of it."""
    write_mlx(tmp_path / "model", Shape("llama"))
    tensors = weights(tmp_path / "model")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.concatenate([tensors[name], np.zeros((8, 64), np.float32)])
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    change_json(tmp_path / "model" / "config.json", vocab_size=328)
    convert(tmp_path / "model", tmp_path / "out.gguf", to="gguf", dtype="f32")
    tokens = gguf.GGUFReader(tmp_path / "out.gguf").get_field("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens.contents()[318:322] == ["<|im_end|>", "<|endoftext|>", "[PAD320]", "[PAD321]"]
    convert(tmp_path / "out.gguf", tmp_path / "back", to="mlx", dtype="f32")
    assert bits(weights(tmp_path / "back")) == bits(tensors)
    assert "[PAD320]" not in config(tmp_path / "back", "tokenizer.json")["model"]["vocab"]
    [said] = ask_both([question(tmp_path / "out.gguf", tmp_path / "back", tmp_path)])
    said.agree()


def test_roles_of_tokens_that_only_llama_cpp_has_are_reported(twins: Path, tmp_path: Path) -> None:
    rewrite(twins / "qwen2.gguf", tmp_path / "m.gguf", Edit(keys={"tokenizer.ggml.fim_pre_token_id": 5}))
    report = convert(tmp_path / "m.gguf", tmp_path / "out", to="mlx")
    assert report.left_out == ("general.name", "tokenizer.ggml.fim_pre_token_id")
