"""Converted models hold the same numbers and tokens, which the engines themselves confirm."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest

from exo.convert import ConversionProgress, ConversionReport, convert
from exo.worker.protocol.commands import Load
from tests.support.converted import Said, ask_both, bits, change_json, config, question, weights
from tests.support.edited_gguf import decoded
from tests.support.program import Program, runner_command
from tests.support.program import ask as generate
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.question import Question
from tests.support.tiny.shape import ARCHITECTURES, Architecture


@dataclass(frozen=True, slots=True)
class Models:
    """One twin as it was made, converted once from each format, and converted there and back again."""

    folder: Path

    @property
    def gguf(self) -> Path:
        return self.folder / "twin.gguf"

    @property
    def mlx(self) -> Path:
        return self.folder / "twin"

    @property
    def from_gguf(self) -> Path:
        return self.folder / "from-gguf"

    @property
    def from_mlx(self) -> Path:
        return self.folder / "from-mlx.gguf"

    @property
    def back(self) -> Path:
        return self.folder / "back"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Models]:
    made: dict[Architecture, Models] = {}
    for architecture in ARCHITECTURES:
        made[architecture] = each = Models(tmp_path_factory.mktemp(architecture))
        write_gguf(each.gguf, Shape(architecture))
        write_mlx(each.mlx, Shape(architecture))
        convert(each.gguf, each.from_gguf, to="mlx", dtype="f32")
        convert(each.mlx, each.from_mlx, to="gguf", dtype="f32")
        convert(each.from_mlx, each.back, to="mlx", dtype="f32")
    return made


@pytest.fixture(scope="module")
def said(
    models: dict[Architecture, Models], tmp_path_factory: pytest.TempPathFactory
) -> dict[Architecture, list[Said]]:
    """Of each architecture: the twins, then what was converted once."""
    questions: list[Question] = []
    for each in models.values():
        questions.append(question(each.gguf, each.mlx, tmp_path_factory.mktemp("twin")))
        questions.append(question(each.from_mlx, each.from_gguf, tmp_path_factory.mktemp("converted")))
    answers = ask_both(questions)
    return {architecture: answers[2 * i : 2 * i + 2] for i, architecture in enumerate(models)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_to_mlx_gives_the_twins_weights_to_the_bit(
    models: dict[Architecture, Models], architecture: Architecture
) -> None:
    each = models[architecture]
    assert bits(weights(each.from_gguf)) == bits(weights(each.mlx))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_safetensors_to_gguf_gives_the_twins_tensors_to_the_bit(
    models: dict[Architecture, Models], architecture: Architecture
) -> None:
    twin, converted = (
        {tensor.name: (tensor.tensor_type, tensor.shape.tolist(), tensor.data.tobytes()) for tensor in reader.tensors}
        for reader in (gguf.GGUFReader(models[architecture].gguf), gguf.GGUFReader(models[architecture].from_mlx))
    )
    assert converted == twin


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_safetensors_to_gguf_and_back_is_the_same_to_the_bit(
    models: dict[Architecture, Models], architecture: Architecture
) -> None:
    each = models[architecture]
    assert bits(weights(each.back)) == bits(weights(each.mlx))
    before, after = config(each.mlx), config(each.back)
    # A real qwen2 configuration has no such key, and a list may name one token.
    before.pop("attention_bias", None)
    assert after.pop("eos_token_id")[0] == before.pop("eos_token_id")
    assert after | before == after
    ends = [config(folder, "generation_config.json")["eos_token_id"] for folder in (each.mlx, each.back)]
    assert sorted(ends[0]) == sorted(ends[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_engines_compute_with_converted_files_what_they_did_before(
    said: dict[Architecture, list[Said]], architecture: Architecture
) -> None:
    twin, converted = said[architecture]
    converted.agree()
    assert (converted.mlx_logits == twin.mlx_logits).all()
    assert (converted.llama_logits == twin.llama_logits).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_engines_tokenize_with_converted_files_as_they_did_before(
    said: dict[Architecture, list[Said]], architecture: Architecture
) -> None:
    twin, converted = said[architecture]
    assert converted.mlx == twin.mlx
    assert converted.llama == twin.llama
    assert converted.llama["warnings"] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chat_template_and_ends_are_carried_over(
    models: dict[Architecture, Models], architecture: Architecture
) -> None:
    each = models[architecture]
    template = config(each.mlx, "tokenizer_config.json")["chat_template"]
    assert config(each.from_gguf, "tokenizer_config.json")["chat_template"] == template
    field = gguf.GGUFReader(each.from_mlx).get_field("tokenizer.chat_template")
    assert field is not None
    assert field.contents() == template
    assert sorted(config(each.from_gguf, "generation_config.json")["eos_token_id"]) == [318, 319]


def test_the_llama_cpp_runner_generates_the_same_from_a_converted_file(models: dict[Architecture, Models]) -> None:
    texts: list[str] = []
    for path in (models["gemma3"].gguf, models["gemma3"].from_mlx):
        with Program(runner_command("exo.worker.runner_cuda")) as runner:
            runner.load(Load(model_id="tiny", backend="LlamaCppCpu", table={"path": str(path)}))
            texts.append(runner.generate(generate("request", temperature=1.0, seed=5))[0].text)
            runner.shutdown()
    assert texts[0]
    assert texts[0] == texts[1]


def test_report_and_progress(models: dict[Architecture, Models], tmp_path: Path) -> None:
    seen: list[ConversionProgress] = []
    report = convert(models["llama"].gguf, tmp_path / "out", to="mlx", dtype="bf16", on_progress=seen.append)
    numbers = sum(array.size for array in weights(models["llama"].mlx).values())
    expected = ConversionReport(tmp_path / "out", "llama", len(seen), numbers, 2 * numbers, ("general.name",))
    assert report == expected
    assert len(seen) == len(decoded(models["llama"].gguf))
    assert {progress.tensor for progress in seen} == set(decoded(models["llama"].gguf))
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(set(done))
    assert done[-1] == seen[0].total_bytes == 2 * numbers


def test_what_a_gguf_file_has_no_place_for_is_reported(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    change_json(tmp_path / "model" / "config.json", auto_map={"AutoModel": "code.Model"}, pretraining_tp=1)
    change_json(tmp_path / "model" / "generation_config.json", temperature=0.6)
    report = convert(tmp_path / "model", tmp_path / "out.gguf", to="gguf", dtype="f32")
    assert report.left_out == (
        "generation_config.json: temperature",
        "config.json: auto_map",
        "config.json: pretraining_tp",
    )


def test_importing_the_package_imports_no_library() -> None:
    """So that the command line starts at once."""
    heavy = ("numpy", "gguf", "mlx", "safetensors", "tokenizers", "torch", "transformers")
    code = f"import sys, exo.convert; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("build", [write_gguf, write_mlx])
def test_converting_needs_neither_torch_nor_transformers(tmp_path: Path, build: Callable[[Path, Shape], None]) -> None:
    source, target = ("m.gguf", "out") if build is write_gguf else ("m", "out.gguf")
    build(tmp_path / source, Shape())
    code = (
        "import sys; from pathlib import Path; from exo.convert import convert;"
        f"convert(Path({source!r}), Path({target!r}), to={'mlx' if target == 'out' else 'gguf'!r}, dtype='f32');"
        "print([name for name in ('torch', 'transformers', 'mlx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
