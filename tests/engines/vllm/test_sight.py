"""Which models vLLM takes pictures for: it says why it cannot before it has loaded anything, or else when it tries."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import JsonValue
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.runners import RUNNERS
from tests.conftest import needs_vllm
from tests.support.pictures import random_picture
from tests.support.program import Program, ask
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.seeing_folder import write_seeing

pytestmark = needs_vllm


def load_command(folder: Path, *tasks: str, **table: JsonValue) -> Load:
    own: dict[str, JsonValue] = {"path": str(folder), "dtype": "float32", "threads": 1, "n_ctx": 256, "slots": 1}
    return Load(model_id="test/tiny", backend="Vllm", table={**own, **table}, tasks=tasks)


def refusal(command: Load) -> str:
    with Program(RUNNERS["vllm"].command) as program:
        program.send(command)
        program.until(lambda: program.failure is not None)
        assert program.failure is not None
        return program.failure.message


def seeing(folder: Path) -> None:
    write_seeing(folder, Shape(head_dim=64))


def without_processor(folder: Path) -> None:
    seeing(folder)
    for file in folder.glob("*processor_config.json"):
        file.unlink()


def text_model(folder: Path) -> None:
    write_mlx(folder, Shape(head_dim=64))
    (folder / "preprocessor_config.json").write_text("{}")


def broken_processor(folder: Path) -> None:
    seeing(folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, "image_processor_type": "No"}))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (without_processor, "has none of preprocessor_config.json, processor_config.json"),
        (text_model, "vLLM has only a text model of this architecture"),
        (broken_processor, "vLLM could not"),
    ],
)
def test_a_model_that_cannot_see_says_why(tmp_path: Path, write: Callable[[Path], None], reason: str) -> None:
    write(tmp_path / "model")
    assert reason in refusal(load_command(tmp_path / "model", pictures=True))


def test_pictures_are_for_one_device_and_for_generation(tmp_path: Path) -> None:
    seeing(tmp_path)
    assert "one device" in refusal(load_command(tmp_path, pictures=True, tensor_parallel_size=2))
    assert "embeddings" in refusal(load_command(tmp_path, "TextEmbedding", pictures=True))


def test_without_pictures_in_the_card_the_model_reads_only(tmp_path: Path) -> None:
    seeing(tmp_path)
    with Program(RUNNERS["vllm"].command) as program:
        program.load(load_command(tmp_path))
        assert program.capabilities is not None
        assert not program.capabilities.vision
        shown = ask("shown").model_copy(update={"prompt": (random_picture(1),)})
        refused, read = program.generate(shown, ask("read", "once upon a time"))
        assert refused.failed.message == "prompt: this model takes no pictures here"
        assert len(read.tokens) == 16


def test_the_plan_counts_the_encoder_and_its_work(tmp_path: Path) -> None:
    seeing(tmp_path)
    found: list[dict[str, int]] = []
    with Program(RUNNERS["vllm"].command) as program:
        for pictures in (False, True):
            program.estimated = None
            program.send(Estimate(load=load_command(tmp_path, pictures=pictures)))
            program.until(lambda: program.estimated is not None)
            assert program.estimated is not None
            found.append(dict(program.estimated.choices[0].parts))
    blind, seen = found
    tensors = load_file(tmp_path / "model.safetensors").values()
    assert blind["weights"] == seen["weights"] == sum(tensor.nbytes for tensor in tensors)
    assert seen["compute"] > blind["compute"]
