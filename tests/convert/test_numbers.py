"""Number formats: what is quantised, dequantised or rounded on the way."""

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from exo.convert import Bits, Dtype, convert
from tests.support.converted import ask_both, config, make_twins, question, weights
from tests.support.edited_gguf import Edit, decoded, rewrite
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.question import ask
from tests.support.tiny.shape import Dtype as Stored


@pytest.mark.parametrize("stored", ["F16", "Q8_0", "Q4_0"])
def test_quantised_sources_are_dequantised(tmp_path: Path, stored: Stored) -> None:
    """Blocks lie within rows, so moving whole rows about and dequantising give the same in either order."""
    write_gguf(tmp_path / "source.gguf", Shape(dtype=stored))
    write_mlx(tmp_path / "twin", Shape())
    convert(tmp_path / "source.gguf", tmp_path / "out", to="mlx", dtype="f32")
    converted = weights(tmp_path / "out")
    for name, tensor in weights(tmp_path / "twin").items():
        kind = gguf.GGMLQuantizationType[stored]
        if stored != "F16" and name in ("model.embed_tokens.weight", "lm_head.weight"):
            kind = gguf.GGMLQuantizationType.F16
        expected = gguf.dequantize(gguf.quantize(tensor, kind), kind) if tensor.ndim == 2 else tensor
        assert (converted[name] == expected).all(), name


def test_every_type_that_gguf_py_dequantises_is_read(tmp_path: Path) -> None:
    """A tensor of each type in turn, of arbitrary bytes, beside gguf-py's own reading of it."""
    write_gguf(tmp_path / "twin.gguf", Shape(hidden=256))
    random = np.random.default_rng(0)
    kinds = ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "TQ1_0", "MXFP4"]
    for kind in (gguf.GGMLQuantizationType[name] for name in kinds):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # Small bytes, as large ones would make some scales infinite or not a number.
        raw = random.integers(0, 60, (128, 256 // block * size), np.uint8)
        path = tmp_path / f"{kind.name}.gguf"
        rewrite(tmp_path / "twin.gguf", path, Edit(raw={"blk.0.ffn_up.weight": (raw, kind)}))
        convert(path, tmp_path / kind.name, to="mlx", dtype="f32")
        converted = weights(tmp_path / kind.name)["model.layers.0.mlp.up_proj.weight"]
        assert np.array_equal(converted, gguf.dequantize(raw, kind)), kind.name


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twins(tmp_path_factory.mktemp("twins"))


@pytest.mark.parametrize(("dtype", "kind"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_gguf_in_smaller_numbers(twins: Path, tmp_path: Path, dtype: Dtype, kind: str) -> None:
    """Matrices are rounded once, vectors not at all."""
    report = convert(twins / "qwen2", tmp_path / "out.gguf", to="gguf", dtype=dtype)
    quantisation = gguf.GGMLQuantizationType[kind]
    stored = decoded(tmp_path / "out.gguf")
    for name, tensor in decoded(twins / "qwen2.gguf").items():
        expected = gguf.dequantize(gguf.quantize(tensor, quantisation), quantisation) if tensor.ndim == 2 else tensor
        assert (stored[name] == expected).all(), name
    asked = question(tmp_path / "out.gguf", twins / "qwen2", tmp_path)
    [answer] = ask("llama_engine", [asked])
    assert answer["warnings"] == []
    size = (tmp_path / "out.gguf").stat().st_size
    assert report.bytes_written < size < report.bytes_written + 20_000


@pytest.mark.parametrize(("dtype", "expected"), [("f16", mx.float16), ("bf16", mx.bfloat16)])
def test_mlx_in_smaller_numbers(twins: Path, tmp_path: Path, dtype: Dtype, expected: mx.Dtype) -> None:
    """Every tensor is rounded once, as MLX itself would."""
    convert(twins / "llama.gguf", tmp_path / "out", to="mlx", dtype=dtype)
    assert config(tmp_path / "out")["torch_dtype"] == {"f16": "float16", "bf16": "bfloat16"}[dtype]
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    exact = weights(twins / "llama")
    assert stored.keys() == exact.keys()
    for name, tensor in exact.items():
        assert stored[name].dtype == expected
        assert mx.array_equal(stored[name], mx.array(tensor).astype(expected)), name
    convert(tmp_path / "out", tmp_path / "back.gguf", to="gguf", dtype="f32")
    asked = question(tmp_path / "back.gguf", twins / "llama", tmp_path)
    [said] = ask_both([asked])
    assert (said.llama_logits.argmax(axis=1) == said.mlx_logits.argmax(axis=1)).mean() >= 0.9


@pytest.mark.parametrize("width", [4, 8])
def test_mlx_quantised_and_back(twins: Path, tmp_path: Path, width: Bits) -> None:
    """mlx-lm runs the quantised folder; llama.cpp runs what is dequantised from it; both compute the same model."""
    convert(twins / "qwen3.gguf", tmp_path / "quantised", to="mlx", dtype="f32", bits=width)
    assert config(tmp_path / "quantised")["quantization"] == {"group_size": 64, "bits": width, "mode": "affine"}
    convert(tmp_path / "quantised", tmp_path / "back.gguf", to="gguf", dtype="f32")
    [said] = ask_both([question(tmp_path / "back.gguf", tmp_path / "quantised", tmp_path)])
    said.agree()
    step = {4: 0.08, 8: 0.005}[width]
    for name, tensor in decoded(twins / "qwen3.gguf").items():
        spread = np.ptp(tensor) if tensor.ndim == 2 else 0
        assert np.abs(decoded(tmp_path / "back.gguf")[name] - tensor).max() <= step * spread, name
