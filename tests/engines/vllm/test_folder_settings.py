"""vLLM computes what MLX does, also of a folder that transformers 5 has written, and loads the index's files alone."""

import json
from pathlib import Path

import pytest
from pydantic import JsonValue
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import RUNNERS
from tests.conftest import needs_vllm
from tests.support.program import Program, ask
from tests.support.tiny import Shape, write_mlx

pytestmark = needs_vllm

LLAMA3: dict[str, JsonValue] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
OLDER: dict[str, JsonValue] = {"rope_theta": 77.0, "rope_scaling": LLAMA3}
NEWER: dict[str, JsonValue] = {"rope_parameters": {"rope_theta": 77.0, **LLAMA3}}


def write(folder: Path, settings: dict[str, JsonValue]) -> Path:
    write_mlx(folder, Shape(head_dim=64))
    config = json.loads((folder / "config.json").read_text())
    if settings:
        del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def generated(folder: Path, runner: str = "vllm") -> tuple[int, ...]:
    table: dict[str, JsonValue] = {"path": str(folder), "dtype": "float32", "n_ctx": 256, "slots": 1}
    backend, own = {"mlx": ("MlxCpu", {}), "vllm": ("Vllm", {"threads": 1})}[runner]
    with Program(RUNNERS[runner].command) as program:
        program.load(Load(model_id="test/tiny", backend=backend, table=table | own))
        [result] = program.generate(ask("one", "once upon a time there was a little model that counted " * 2))
        return tuple(result.tokens)


def test_positions_and_the_index(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    older = write(tmp_path / "older", OLDER)
    expected = generated(older, "mlx")
    assert generated(write(tmp_path / "plain", {}), "mlx") != expected
    assert generated(older) == expected
    newer = write(tmp_path / "newer", NEWER)
    weights = load_file(newer / "model.safetensors")
    (newer / "model.safetensors").rename(newer / "whole.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "whole.safetensors")}
    (newer / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: -array for name, array in weights.items()}, newer / "model.safetensors")
    assert generated(newer) == expected
    assert "not loaded: model.safetensors" in capfd.readouterr().err
