"""What is asked of the converter, and numbers that what is asked for cannot hold."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exo.convert import Bits, ConvertError, convert
from tests.support.converted import make_twins, refuse, weights
from tests.support.edited_gguf import Edit, decoded, rewrite
from tests.support.tiny import Shape, write_gguf, write_mlx


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twins(tmp_path_factory.mktemp("twins"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "mlx", "dtype": "f64"}, "dtype: is 'f64', expected one of f32, f16, bf16"),
        ({"to": "mlx", "dtype": "q8_0"}, "dtype: is 'q8_0', expected one of f32, f16, bf16"),
        ({"to": "mlx", "bits": 3}, "bits: is 3, expected 4 or 8"),
        ({"to": "gguf", "bits": 4}, "bits: 4 is for MLX; a GGUF file is quantised by dtype='q8_0'"),
        ({"to": "gguf", "dtype": "q4_0"}, "dtype: is 'q4_0', expected one of f32, f16, bf16, q8_0"),
        ({"to": "onnx"}, "to: is 'onnx', expected mlx or gguf"),
    ],
)
def test_arguments(twins: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source, target = ("llama.gguf", "out") if options["to"] == "mlx" else ("llama", "out.gguf")
    with pytest.raises(ConvertError) as error:
        convert(twins / source, tmp_path / target, **options)
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []


def test_rows_that_blocks_cannot_fill(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape(hidden=48))
    write_gguf(tmp_path / "model.gguf", Shape(hidden=48))
    message = "token_embd.weight: has rows of 48, but Q8_0 needs blocks of 32"
    refuse(tmp_path / "model", tmp_path / "out.gguf", message, dtype="q8_0")
    message = "model.embed_tokens.weight: has rows of 48, but MLX quantises groups of 64"
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path / "model.gguf", tmp_path / "out", to="mlx", bits=4)


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_numbers_that_float16_cannot_hold(twins: Path, tmp_path: Path, value: float) -> None:
    data = decoded(twins / "llama.gguf")["blk.1.ffn_gate.weight"].copy()
    data[3, 5] = value
    rewrite(twins / "llama.gguf", tmp_path / "model.gguf", Edit(tensors={"blk.1.ffn_gate.weight": data}))
    message = f"model.layers.1.mlp.gate_proj.weight: holds {value:g}, but F16 reaches 65504; f32 keeps every value"
    refuse(tmp_path / "model.gguf", tmp_path / "out", message, dtype="f16")
    convert(tmp_path / "model.gguf", tmp_path / "exact", to="mlx", dtype="f32")
    kept = weights(tmp_path / "exact")["model.layers.1.mlp.gate_proj.weight"]
    assert np.array_equal(kept, data, equal_nan=True)


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    refuse(
        tmp_path / "absent.gguf", tmp_path / "out", f"{tmp_path / 'absent.gguf'}: no such file; expected a .gguf file"
    )
    refuse(tmp_path, tmp_path / "out", f"{tmp_path}: no such file; expected a .gguf file")
    refuse(tmp_path / "absent", tmp_path / "out.gguf", f"{tmp_path / 'absent' / 'config.json'}: no such file")


@pytest.mark.parametrize(
    ("package", "bits", "message"),
    [
        ("gguf", None, "gguf: this package is needed: pip install 'exo[convert]'"),
        ("mlx", 4, "mlx: this package is needed for MLX's quantisation: pip install 'exo[mlx]'"),
    ],
)
def test_a_package_that_is_not_installed(
    twins: Path, tmp_path: Path, package: str, bits: Bits | None, message: str
) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pathlib import Path; from exo.convert import ConvertError, convert\n"
        f"try: convert(Path(sys.argv[1]), Path('out'), to='mlx', bits={bits})\n"
        "except ConvertError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(twins / "llama.gguf")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == message
    assert list(tmp_path.iterdir()) == []
