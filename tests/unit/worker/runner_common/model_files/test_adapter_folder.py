"""Adapters in PEFT's format: what fits the model is read, and what does not is an error that names it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.adapter_folder import AdapterFolder, AdapterOptions, find_adapters
from exo.worker.runner_common.model_files.model_folder import read_folder
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.adapter import RANK, write_peft_adapter


def found(folder: Path, *names: str) -> list[AdapterFolder]:
    write_mlx(folder / "model", Shape())
    options = [AdapterOptions(name=name, path=name) for name in names or ("one",)]
    return find_adapters(options, "test/tiny", [str(folder)], read_folder(folder / "model"), "mlx")


def test_rank_scale_and_the_pairs_of_tensors_are_read(tmp_path: Path) -> None:
    write_peft_adapter(tmp_path / "one", Shape(), lora_alpha=8)
    write_peft_adapter(tmp_path / "two", Shape(), lora_alpha=8, use_rslora=True)
    one, two = found(tmp_path, "one", "two")
    assert (one.name, one.rank, one.scale, two.scale) == ("one", RANK, 2, 4)
    prefix = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    assert one.pairs()["model.layers.1.mlp.up_proj"] == (f"{prefix}A.weight", f"{prefix}B.weight")
    assert len(one.pairs()) == 6


def without_weights(folder: Path) -> None:
    write_peft_adapter(folder, Shape())
    (folder / "adapter_model.safetensors").unlink()


def with_tensor(name: str, *shape: int, kind: type = np.float32) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_peft_adapter(folder, Shape())
        save_file({f"base_model.model.{name}": np.zeros(shape, kind)}, folder / "adapter_model.safetensors")

    return write


def with_setting(**settings: object) -> Callable[[Path], None]:
    return lambda folder: write_peft_adapter(folder, Shape(), 1, **settings)


def of_shape(shape: Shape) -> Callable[[Path], None]:
    return lambda folder: write_peft_adapter(folder, shape)


def a_model(folder: Path) -> None:
    write_mlx(folder, Shape())


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (a_model, "does not say peft_type = LORA"),
        (without_weights, "adapter_model.safetensors cannot be read: No such file"),
        (of_shape(Shape(layers=3)), "which the model does not have"),
        (of_shape(Shape(hidden=96)), "has tensors of [4, 96]"),
        (with_setting(r=8), "has tensors of [4, 64] and [128, 4] for model.layers.0.mlp.gate_proj"),
        (with_setting(r="many"), "has r = many and lora_alpha = 4, expected two numbers"),
        (with_setting(use_dora=True), "has use_dora = True, which is not supported"),
        (with_setting(modules_to_save=["lm_head"]), "has modules_to_save = ['lm_head'], which is not supported"),
        (with_tensor("model.layers.0.mlp.up_proj.lora_A.weight", 4, 64), "has tensors that are no pairs"),
        (with_tensor("model.norm.weight", 64), "are no pairs for a matrix: base_model.model.model.norm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, write: Callable[[Path], None], reason: str) -> None:
    write(tmp_path / "one")
    with pytest.raises(LoadError) as caught:
        found(tmp_path)
    assert str(caught.value).startswith("model card, [[mlx.lora]] one: ")
    assert reason in str(caught.value)


def test_a_folder_that_is_not_there_and_a_name_that_is_taken_are_errors(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"\[\[mlx.lora\]\] one: no model folder") as caught:
        found(tmp_path)
    assert caught.value.code == "model_not_found"
    write_peft_adapter(tmp_path / "one", Shape())
    with pytest.raises(LoadError, match="another adapter has the same name"):
        found(tmp_path, "one", "one")
