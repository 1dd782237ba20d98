"""What runner_mlx loads, and in which words it refuses the rest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import JsonValue
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Failed
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.model_folder import find_folder, read_folder
from exo.worker.runner_mlx.loading.options import read_options
from exo.worker.runner_mlx.probe import probe
from tests.support.program import Program, ask, runner_command
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.tokenizer import CHAT_TEMPLATE

Break = Callable[[Path], object]


def edit(file: Path, **changes: JsonValue) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def of_unknown_type(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "Perceptron"
    edit(folder / "tokenizer.json", model=tokenizer["model"])


TENSOR = '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
BROKEN: dict[str, tuple[Break, str]] = {
    "config missing": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config broken": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not a JSON object"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "config without type": (lambda folder: edit(folder / "config.json", model_type=None), "model_type"),
    "code named": (lambda folder: edit(folder / "config.json", model_file="model.py"), "has model_file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model*.safetensors"),
    "pickle": (to_pickle, "pytorch_model.bin is a pickle"),
    "weights cut short": (lambda folder: cut(folder / "model.safetensors"), "is cut short"),
    "weights something else": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"GGUF" + bytes(100)),
        "is not a safetensors file",
    ),
    "weights with a deep header": (
        lambda folder: (folder / "model.safetensors").write_bytes(header("[" * 50_000)),
        "is not a safetensors file",
    ),
    "weights larger than their place": (
        lambda folder: (folder / "model.safetensors").write_bytes(header(TENSOR.replace("[4]", "[5]")) + bytes(16)),
        "a is F32 of shape (5,) at bytes 0 to 16",
    ),
    "weights at a negative place": (
        lambda folder: (folder / "model.safetensors").write_bytes(header(TENSOR.replace("0, 16", "-16, 0"))),
        "is not a safetensors file",
    ),
    "weights past a hole": (
        lambda folder: (folder / "model.safetensors").write_bytes(header(TENSOR.replace("0, 16", "4, 20")) + bytes(20)),
        "at bytes 4 to 20, and 0 are taken",
    ),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is not a safetensors file"),
    "shard missing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}'
        ),
        "model-00002-of-00002.safetensors, which is not there",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_no_model_is_refused_in_plain_words(tmp_path: Path, case: str) -> None:
    write_mlx(tmp_path, Shape())
    assert read_folder(tmp_path).config["model_type"] == "llama"
    spoil, words = BROKEN[case]
    spoil(tmp_path)
    with pytest.raises(LoadError) as refusal:
        read_folder(tmp_path)
    assert refusal.value.code == "model_load_failed"
    assert words in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_a_folder_is_found_by_path_by_repo_and_by_model_id(tmp_path: Path) -> None:
    directories = [str(tmp_path / "one"), str(tmp_path / "two")]
    for folder in ("one/org--named", "two/org--model", "two/org--model/inner", "two/plain"):
        (tmp_path / folder).mkdir(parents=True)

    def found(**table: JsonValue) -> str:
        return str(find_folder(read_options(table), "org/model", directories).relative_to(tmp_path))

    assert found() == "two/org--model"
    assert found(repo="org/named") == "one/org--named"
    assert found(path="plain") == "two/plain"
    assert found(path="inner") == "two/org--model/inner"
    assert found(path=str(tmp_path / "two" / "plain")) == "two/plain"


def test_a_folder_that_is_not_there_is_not_found_and_the_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as refusal:
        find_folder(read_options({"repo": "org/other"}), "org/model", [str(tmp_path)])
    assert refusal.value.code == "model_not_found"
    assert f"{tmp_path}/org--other" in str(refusal.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"n_gpu_layers": 1}, "n_gpu_layers"),
        ({"dtype": "int8"}, "dtype"),
        ({"slots": 0}, "slots"),
        ({"repo": "a/b"}, "either path or repo"),
    ],
)
def test_a_table_with_a_wrong_key_is_refused_by_its_name(table: dict[str, JsonValue], words: str) -> None:
    with pytest.raises(LoadError) as refusal:
        read_options({"path": "folder", **table})
    assert refusal.value.code == "model_misconfigured"
    assert "[mlx]" in str(refusal.value)
    assert words in str(refusal.value)


# --- the runner itself ---


def failure_of(table: dict[str, JsonValue], backend: str = "MlxCpu") -> Failed:
    with Program(runner_command(RUNNERS["mlx"].module)) as program:
        program.send(Load(model_id="test/tiny", backend=backend, table=table))
        assert program.drain() != 0
        assert program.failure is not None
        return program.failure


FAILING: dict[str, tuple[Break, str]] = {
    "tensor missing": (without_tensor, "model.layers.1.mlp.up_proj.weight"),
    "type unknown": (lambda folder: edit(folder / "config.json", model_type="perceptron"), "perceptron"),
    "numbers that do not fit": (lambda folder: edit(folder / "config.json", hidden_size=63), "shape"),
    "type that is not batched": (lambda folder: edit(folder / "config.json", model_type="gemma2"), "needs slots = 1"),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer of an unknown type": (of_unknown_type, "mlx-lm could not load the tokenizer"),
    "tokenizer's length a text": (
        lambda folder: edit(folder / "tokenizer_config.json", model_max_length="x"),
        "the model cannot be loaded: TypeError",
    ),
    "end a text": (lambda folder: edit(folder / "generation_config.json", eos_token_id="<|im_end|>"), "eos_token_id"),
    "beginning a list": (lambda folder: edit(folder / "config.json", bos_token_id=[1]), "config.json is refused by"),
    "length a text": (
        lambda folder: edit(folder / "config.json", max_position_embeddings="4096"),
        "config.json is refused by transformers",
    ),
    "more layers than any network has": (
        lambda folder: edit(folder / "config.json", num_hidden_layers=10**9),
        "config.json has num_hidden_layers = 1000000000, expected a whole number from 1 to 10000",
    ),
    "padding empty": (lambda folder: edit(folder / "config.json", pad_token_id=""), "'pad_token_id'"),
    "quantisation without sizes": (lambda folder: edit(folder / "config.json", quantization={}), "'group_size'"),
    "a package missing": (lambda folder: edit(folder / "config.json", model_type="olmo"), "SystemExit"),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_mlx_lm_cannot_load_fails_the_runner_with_its_reason(tmp_path: Path, case: str) -> None:
    write_mlx(tmp_path, Shape())
    spoil, words = FAILING[case]
    spoil(tmp_path)
    failure = failure_of({"path": str(tmp_path), "slots": 2})
    assert failure.code == "model_load_failed"
    assert words in failure.message


def test_a_backend_that_is_not_there_is_refused(tmp_path: Path) -> None:
    found = probe().backends
    assert "MlxCpu" in found
    missing = next(backend for backend in ("MlxCuda", "MlxMetal") if backend not in found)
    write_mlx(tmp_path, Shape())
    failure = failure_of({"path": str(tmp_path)}, missing)
    assert failure.code == "model_load_failed"
    assert missing in failure.message
    assert "MlxCpu" in failure.message


def test_capabilities_tell_the_model_s_template_and_tokens_and_the_card_s_come_first(tmp_path: Path) -> None:
    write_mlx(tmp_path, Shape())
    with Program(runner_command(RUNNERS["mlx"].module)) as program:
        known = program.load(Load(model_id="test/tiny", backend="MlxCpu", table={"path": str(tmp_path)}))
        assert (known.engine, known.backend, known.devices) == ("MLX", "MlxCpu", ("CPU",))
        assert (known.chat_template, known.eos_token) == (CHAT_TEMPLATE, "<|im_end|>")
        assert set(known.special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
        assert known.context_length == 4096
        assert known.model_bytes > 100_000
        [result] = program.generate(ask("one", "<|im_end|>"))
        assert result.finished.usage.prompt_tokens == len("<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text("from a file of its own")
    with Program(runner_command(RUNNERS["mlx"].module)) as program:
        known = program.load(Load(model_id="test/tiny", backend="MlxCpu", table={"path": str(tmp_path)}))
        assert known.chat_template == "from a file of its own"
    with Program(runner_command(RUNNERS["mlx"].module)) as program:
        table: dict[str, JsonValue] = {"path": str(tmp_path), "chat_template": "from the card"}
        known = program.load(Load(model_id="test/tiny", backend="MlxCpu", table=table))
        assert known.chat_template == "from the card"
