"""The tiny models themselves: both engines must read the same model out of the two files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.question import Answer, Question, ask
from tests.support.tiny.shape import ARCHITECTURES, Architecture, Dtype
from tests.support.tiny.texts import TEXTS, log_softmax
from tests.support.tiny.tokenizer import Tokenizer

PROMPT = 60
GREEDY = 64


@dataclass(frozen=True, slots=True)
class Twin:
    question: Question
    llama: Answer
    mlx: Answer

    def logits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.load(self.question["llama_logits"]), np.load(self.question["mlx_logits"])


def question_about(folder: Path, shape: Shape, greedy: int = GREEDY) -> Question:
    """Ask for logits along a random prompt, fed in two batches and then singly, and along greedy tokens."""
    tokens = np.random.default_rng(1).integers(0, shape.vocabulary, PROMPT).tolist()
    return {
        "gguf": str(folder / "model.gguf"),
        "folder": str(folder),
        "batches": [tokens[:40], tokens[40:50], *([token] for token in tokens[50:])],
        "greedy": greedy,
        "texts": TEXTS,
        "llama_logits": str(folder / "llama.npy"),
        "mlx_logits": str(folder / "mlx.npy"),
    }


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Twin]:
    questions: list[Question] = []
    for architecture in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(architecture)
        shape = Shape(architecture)
        write_mlx(folder, shape)
        write_gguf(folder / "model.gguf", shape)
        questions.append(question_about(folder, shape))
    answers = zip(ARCHITECTURES, questions, ask("llama_engine", questions), ask("mlx_engine", questions), strict=True)
    return {architecture: Twin(question, llama, mlx) for architecture, question, llama, mlx in answers}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_engines_compute_the_same_log_probabilities(
    twins: dict[Architecture, Twin], architecture: Architecture
) -> None:
    llama, mlx = twins[architecture].logits()
    assert llama.shape == mlx.shape == (PROMPT + GREEDY, Shape(architecture).vocabulary)
    assert np.abs(log_softmax(llama) - log_softmax(mlx)).max() <= 1e-3
    assert (llama.argmax(axis=1) == mlx.argmax(axis=1)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_varied_and_readable_and_does_not_end(
    twins: dict[Architecture, Twin], architecture: Architecture
) -> None:
    vocabulary = Tokenizer.of_size(Shape(architecture).vocabulary).tokens
    generated = twins[architecture].logits()[0].argmax(axis=1)[PROMPT - 1 :]
    assert all(vocabulary[token].printable for token in generated)
    assert len(set(generated.tolist())) >= 15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_engines_tokenize_alike(twins: dict[Architecture, Twin], architecture: Architecture) -> None:
    twin = twins[architecture]
    assert twin.llama["special"] == twin.mlx["special"]
    assert twin.llama["plain"] == twin.mlx["plain"]


def test_special_text_is_one_token_only_where_it_is_parsed(twins: dict[Architecture, Twin]) -> None:
    twin = twins["llama"]
    chat = TEXTS.index("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    tokenizer = Tokenizer.of_size(Shape("llama").vocabulary)
    start = tokenizer.id_of("<|im_start|>")
    assert twin.llama["special"][chat].count(start) == 2
    assert start not in twin.llama["plain"][chat]


def test_words_are_one_token_or_several(twins: dict[Architecture, Twin]) -> None:
    tokens = Tokenizer.of_size(Shape("llama").vocabulary).tokens
    ids = twins["llama"].llama["plain"][TEXTS.index(" the stopper and a hello world")]
    assert "|".join(tokens[number].text for number in ids) == "Ġthe|Ġstop|p|er|Ġand|Ġa|Ġ|hello|Ġ|world"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_loads_without_warnings(twins: dict[Architecture, Twin], architecture: Architecture) -> None:
    assert twins[architecture].llama["warnings"] == []


def test_quantised_files_hold_nearly_the_same_model(tmp_path: Path) -> None:
    dtypes: tuple[Dtype, ...] = ("F32", "F16", "Q8_0", "Q4_0")
    questions: list[Question] = []
    for dtype in dtypes:
        folder = tmp_path / dtype
        folder.mkdir()
        write_gguf(folder / "model.gguf", Shape("llama", dtype=dtype))
        questions.append(question_about(folder, Shape("llama"), greedy=0))
    ask("llama_engine", questions)
    exact, *others = (np.load(question["llama_logits"]).argmax(axis=1) for question in questions)
    agreement = {dtype: (exact == other).mean() for dtype, other in zip(dtypes[1:], others, strict=True)}
    assert agreement["F16"] >= 0.95
    assert agreement["Q8_0"] >= 0.85
    assert agreement["Q4_0"] >= 0.3
    sizes = [Path(question["gguf"]).stat().st_size for question in questions]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_files_carry_the_same_chat_template_and_end(
    twins: dict[Architecture, Twin], architecture: Architecture
) -> None:
    question = twins[architecture].question
    reader = gguf.GGUFReader(question["gguf"])
    config = json.loads((Path(question["folder"]) / "tokenizer_config.json").read_text())
    ends = json.loads((Path(question["folder"]) / "generation_config.json").read_text())["eos_token_id"]
    template = reader.get_field("tokenizer.chat_template")
    end = reader.get_field("tokenizer.ggml.eos_token_id")
    assert template is not None
    assert template.contents() == config["chat_template"]
    assert end is not None
    assert end.contents() == ends[0]
    assert Tokenizer.of_size(Shape(architecture).vocabulary).tokens[ends[0]].text == config["eos_token"] == "<|im_end|>"


def test_equal_shapes_give_equal_bytes_and_other_seeds_others(tmp_path: Path) -> None:
    shapes = {"first": Shape("gemma3"), "again": Shape("gemma3"), "other": Shape("gemma3", seed=1)}
    for name, shape in shapes.items():
        write_mlx(tmp_path / name, shape)
        write_gguf(tmp_path / name / "model.gguf", shape)
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    for weights in ("model.gguf", "model.safetensors"):
        assert (tmp_path / "first" / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"architecture": "mamba"}, "architecture"),
        ({"dtype": "Q4_K"}, "dtype"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"architecture": "gemma3", "layers": 2}, "layers"),
        ({"architecture": "qwen2", "hidden": 128}, "head_dim"),
        ({"hidden": 48, "dtype": "Q8_0"}, "hidden"),
    ],
)
def test_a_shape_no_engine_could_load_is_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} "):
        Shape(**arguments)


@pytest.mark.parametrize("vocabulary", [259, 1_000_000])
def test_a_vocabulary_without_tokens_to_fill_it_is_refused(tmp_path: Path, vocabulary: int) -> None:
    with pytest.raises(ValueError, match=r"^vocabulary "):
        write_gguf(tmp_path / "model.gguf", Shape(vocabulary=vocabulary))


def test_a_quantised_folder_for_mlx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dtype "):
        write_mlx(tmp_path, Shape(dtype="Q8_0"))
