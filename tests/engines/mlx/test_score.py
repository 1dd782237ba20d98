"""``python -m exo.worker.runner_mlx --score``."""

import json
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Load, Text
from exo.worker.protocol.events import Failed
from exo.worker.protocol.runners import RUNNERS
from exo.worker.protocol.score import Score, Scored
from tests.support.program import Program, ask, runner_command
from tests.support.tiny import Shape, write_mlx

PROMPT = tuple(b"once upon a time")
COMMAND = runner_command(RUNNERS["mlx"].module)


def score(request: Score) -> tuple[int, bytes]:
    done = subprocess.run([*COMMAND, "--score"], input=request.model_dump_json().encode(), stdout=subprocess.PIPE)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("tiny")
    write_mlx(folder, Shape("gemma3"))
    table = {"path": str(folder), "dtype": "float32", "n_ctx": 256}
    return Load(model_id="test/tiny", backend="MlxCpu", table=table)


def test_the_likeliest_next_tokens_are_those_that_the_runner_generates(load: Load, tmp_path: Path) -> None:
    with Program(COMMAND) as program:
        program.load(load)
        [generated] = program.generate(ask("one", PROMPT, max_tokens=60))
    read = (*PROMPT, *generated.tokens)
    text = (Text(text="<|im_end|>"), Text(text="<|im_end|>", special=True))
    code, answer = score(Score(load=load, prompts=(read, text), directory=str(tmp_path)))
    assert code == 0
    scored = Scored.model_validate_json(answer)
    assert scored.tokens == (read, (*b"<|im_end|>", 318))
    assert scored.capabilities.engine == "MLX"
    assert scored.settings["computed in"] == "float32"

    rows: NDArray[np.float32] = np.load(tmp_path / "0.npy")
    assert rows.dtype == np.float32
    assert rows.shape == (len(read), scored.capabilities.vocabulary)
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)
    assert rows.argmax(axis=1)[len(PROMPT) - 1 : -1].tolist() == generated.tokens
    assert np.load(tmp_path / "1.npy").shape == (11, scored.capabilities.vocabulary)


def test_quantised_weights_are_computed_with_in_float32_on_a_cpu(load: Load, tmp_path: Path) -> None:
    """In bfloat16, as such files are usually stored, MLX's sums on a CPU would be 4.6 % off."""
    write_mlx(tmp_path, Shape())
    stored: dict[str, mx.array] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        weight = mx.array(tensor, mx.bfloat16)
        if name.endswith("norm.weight"):
            stored[name] = weight
            continue
        packed, scales, biases = mx.quantize(weight, group_size=64, bits=4)
        module = name.removesuffix(".weight")
        stored |= {name: packed, f"{module}.scales": scales, f"{module}.biases": biases}
    mx.save_safetensors(tmp_path / "model.safetensors", stored)  # pyright: ignore[reportUnknownMemberType]
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    quantised = load.model_copy(update={"table": {"path": str(tmp_path)}})
    code, answer = score(Score(load=quantised, prompts=(PROMPT,), directory=str(tmp_path)))
    assert code == 0
    settings = Scored.model_validate_json(answer).settings
    assert (settings["quantisation"], settings["computed in"]) == ("group_size 64, bits 4", "float32")


def test_a_text_that_does_not_fit_the_context_is_refused(load: Load, tmp_path: Path) -> None:
    code, answer = score(Score(load=load, prompts=((1,) * 257,), directory=str(tmp_path)))
    assert code == 1
    failure = Failed.model_validate_json(answer)
    assert failure.code == "context_length_exceeded"
    assert "257" in failure.message


def test_a_model_that_does_not_load_is_said_so(load: Load, tmp_path: Path) -> None:
    other = load.model_copy(update={"table": {"path": str(tmp_path / "nowhere")}})
    code, answer = score(Score(load=other, prompts=((1,),), directory=str(tmp_path)))
    assert code == 1
    assert Failed.model_validate_json(answer).code == "model_not_found"
