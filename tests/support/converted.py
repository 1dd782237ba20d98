"""Helpers for the tests of the converter: they read converted models and ask both engines about them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import JsonValue
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from exo.convert import ConvertError, Dtype, convert
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.question import Answer, Question, ask
from tests.support.tiny.shape import ARCHITECTURES
from tests.support.tiny.texts import TEXTS, log_softmax

TOKENS = np.random.default_rng(1).integers(0, Shape().vocabulary, 60).tolist()

Logits = NDArray[np.float32]


def question(gguf_file: Path, folder: Path, scratch: Path) -> Question:
    return {
        "gguf": str(gguf_file),
        "folder": str(folder),
        "batches": [TOKENS],
        "greedy": 0,
        "texts": TEXTS,
        "llama_logits": str(scratch / "llama.npy"),
        "mlx_logits": str(scratch / "mlx.npy"),
    }


@dataclass(frozen=True, slots=True)
class Said:
    """The answers of llama.cpp and mlx-lm about a GGUF file and a folder."""

    question: Question
    llama: Answer
    mlx: Answer

    @property
    def llama_logits(self) -> Logits:
        return np.load(self.question["llama_logits"])

    @property
    def mlx_logits(self) -> Logits:
        return np.load(self.question["mlx_logits"])

    def agree(self, tolerance: float = 1e-3) -> None:
        """Compares the engines' log-probabilities over the whole vocabulary, and their tokens."""
        llama, mlx = log_softmax(self.llama_logits), log_softmax(self.mlx_logits)
        assert np.abs(llama - mlx).max() <= tolerance
        assert self.llama["special"] == self.mlx["special"]
        assert self.llama["plain"] == self.mlx["plain"]


def ask_both(questions: list[Question]) -> list[Said]:
    answers = zip(questions, ask("llama_engine", questions), ask("mlx_engine", questions), strict=True)
    return [Said(*each) for each in answers]


def bits(tensors: dict[str, NDArray[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in tensors.items()}


def weights(folder: Path) -> dict[str, NDArray[Any]]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def change_json(path: Path, **keys: JsonValue) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def make_twins(folder: Path) -> Path:
    """Writes a GGUF file and a folder for each architecture, such as ``llama.gguf`` and ``llama``."""
    for architecture in ARCHITECTURES:
        write_gguf(folder / f"{architecture}.gguf", Shape(architecture))
        write_mlx(folder / architecture, Shape(architecture))
    return folder


def refuse(source: Path, target: Path, message: str, dtype: Dtype = "f32") -> None:
    """Checks that the conversion is refused with a message that begins so, and changes nothing beside the target."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(ConvertError) as error:
        convert(source, target, to="gguf" if target.suffix == ".gguf" else "mlx", dtype=dtype)
    assert str(error.value).startswith(message), str(error.value)
    assert sorted(target.parent.iterdir()) == before
