"""Vectors by the vLLM runner: beside the other runners', of texts that go wrong, and through the server."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from pydantic import JsonValue
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Embed, Load, Text
from exo.worker.protocol.runners import RUNNERS
from tests.conftest import needs_vllm
from tests.engines.test_estimate import TOLERANCE, choices, prompt
from tests.engines.vllm.test_environment import VLLM, WITHOUT_VLLM
from tests.support.program import Program, ask, names
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.encoder import CLS, NORM_EPS, SEP, VOCABULARY, Encoder
from tests.support.tiny.shape import Architecture
from tests.support.twins import FLOAT32

TEXTS = ("once upon a time", "x", "the quick brown fox jumps over the lazy dog " * 12, "hello world and you")
TASKS = ("TextEmbedding",)

pytestmark = needs_vllm

name = names()


def load_command(folder: Path, *tasks: str, **table: JsonValue) -> Load:
    table = {"path": str(folder), "dtype": "float32", "threads": 1, **table}
    return Load(model_id="test/tiny", backend="Vllm", table=table, tasks=tasks)


@contextmanager
def embedding(folder: Path, **table: JsonValue) -> Generator[Program]:
    with Program(VLLM.command) as program:
        program.load(load_command(folder, *TASKS, **table))
        yield program


def embed(text: str) -> Embed:
    return Embed(id=next(name), prompt=(Text(text=text),))


def vectors(program: Program, *texts: str) -> npt.NDArray[np.float64]:
    """Shape (texts, size)."""
    return np.array([result.embedded.vector for result in program.generate(*map(embed, texts))])


def others(runner: str, load: Load) -> npt.NDArray[np.float64]:
    with Program(RUNNERS[runner].command) as program:
        program.load(load)
        return vectors(program, *TEXTS)


@pytest.mark.parametrize(
    ("architecture", "pooling", "table"),
    [("qwen3", "mean", {"tensor_parallel_size": 2}), ("gemma3", "last", {"max_num_batched_tokens": 32})],
)
def test_the_vectors_are_those_of_the_other_runners_and_take_the_memory_that_was_counted(
    tmp_path: Path, architecture: Architecture, pooling: str, table: dict[str, JsonValue]
) -> None:
    shape = Shape(architecture, head_dim=64)
    gguf, folder = tmp_path / "tiny.gguf", tmp_path / "tiny"
    write_gguf(gguf, shape)
    write_mlx(folder, shape)
    cuda = Load(model_id="t", backend="LlamaCppCpu", table={"path": str(gguf), "pooling": pooling, **FLOAT32})
    mlx = Load(model_id="t", backend="MlxCpu", table={"path": str(folder), "pooling": pooling, "dtype": "float32"})
    command = load_command(folder, *TASKS, pooling=pooling, **table)
    with Program(VLLM.command) as program:
        choice = choices(program, command)[0]
        chosen = command.model_copy(update={"table": {**command.table, **choice.settings}})
        longest = program.load(chosen).context_length
        ours = vectors(program, *TEXTS)
        program.generate(*(Embed(id=next(name), prompt=tuple(prompt(longest, first))) for first in range(4)))
        runner = psutil.Process(program.process.pid)
        taken = sum(each.memory_info().rss for each in (runner, *runner.children(recursive=True)))
    assert choice.host == pytest.approx(taken, rel=TOLERANCE)
    for theirs in (others("cuda", cuda), others("mlx", mlx)):
        assert ((ours * theirs).sum(axis=1) > 0.99999).all()
        assert np.abs(ours - theirs).max() < 1e-4


def with_dense_layer(folder: Path) -> npt.NDArray[np.float32]:
    """A last layer as Sentence Transformers has it; its matrix, shape (out, in)."""
    matrix = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    kind = "sentence_transformers.models"
    modules = {"0": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    listed = [{"idx": int(path[0]), "path": path, "type": f"{kind}.{name}"} for path, name in modules.items()]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "2_Dense").mkdir()
    sizes = {"in_features": 64, "out_features": 16, "bias": False}
    activation = "torch.nn.modules.linear.Identity"
    (folder / "2_Dense" / "config.json").write_text(json.dumps({**sizes, "activation_function": activation}))
    save_file({"linear.weight": matrix}, folder / "2_Dense" / "model.safetensors")
    return matrix


def test_a_last_layer_is_computed_or_nothing_is(tmp_path: Path) -> None:
    write_mlx(tmp_path, Shape(head_dim=64))
    table: dict[str, JsonValue] = {"path": str(tmp_path), "dtype": "float32", "pooling": "cls"}
    load = Load(model_id="t", backend="MlxCpu", table=table)
    pooled = others("mlx", load)
    expected = pooled @ with_dense_layer(tmp_path).T
    with embedding(tmp_path, pooling="cls") as program:
        ours = vectors(program, *TEXTS)
    assert np.abs(ours - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() < 1e-4
    with Program(RUNNERS["mlx"].command) as program:
        assert not program.load(load).embeddings
    (tmp_path / "2_Dense" / "model.safetensors").write_bytes(b"a pickle")
    assert "2_Dense/model.safetensors is not a safetensors file" in refusal(load_command(tmp_path, *TASKS))
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    assert "2_Dense/model.safetensors is missing" in refusal(load_command(tmp_path, *TASKS))
    (tmp_path / "modules.json").write_text('[{"type": "Dense.Dense", "path": "../2_Dense"}]')
    assert "'../2_Dense', which is not in the folder" in refusal(load_command(tmp_path, *TASKS))


def refusal(load: Load) -> str:
    """Why a runner in whose environment vLLM cannot be imported does not even try."""
    with Program([*VLLM.command[:1], "-c", WITHOUT_VLLM]) as program:
        program.send(load)
        assert program.drain() != 0
        assert program.failure is not None
        return program.failure.message


def test_a_text_that_goes_wrong_fails_alone_and_one_that_is_embedded_generates_nothing(tmp_path: Path) -> None:
    """One token's embedding is no number, so whatever has it in it gets no vector."""
    write_mlx(tmp_path, Shape(head_dim=64))
    weights: dict[str, npt.NDArray[np.float32]] = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][120] = np.nan
    save_file(weights, tmp_path / "model.safetensors")
    with embedding(tmp_path) as program:
        capabilities = program.capabilities
        assert capabilities is not None
        assert (capabilities.embeddings, capabilities.logprobs, capabilities.grammar) == (True, False, False)
        assert capabilities.context_length == 2048
        (before,) = vectors(program, "a good word" * 9)
        good = embed("a good word" * 9)
        bad = [Embed(id=next(name), prompt=(97, 120, *[98] * length)) for length in (30, 2000, 100)]
        results = program.generate(*bad, good, *(each.model_copy(update={"id": next(name)}) for each in bad))
        for result in (*results[:3], *results[4:]):
            assert result.failed.code == "engine_error"
        assert results[3].embedded.vector == pytest.approx(before, abs=1e-5)
        assert vectors(program, "a good word" * 9)[0] == pytest.approx(before, abs=1e-5)
        (refused,) = program.generate(ask(next(name)))
        assert (refused.failed.code, refused.failed.param) == ("invalid_request", "model")
        assert "loaded to make vectors" in refused.failed.message


@pytest.mark.parametrize(
    ("tasks", "table", "named"),
    [
        (
            ("TextGeneration", "TextEmbedding"),
            {"pooling": "last"},
            "[vllm] pooling: it is only for a card with the task TextEmbedding",
        ),
        (TASKS, {"pooling": "max"}, "[vllm] pooling: Input should be 'mean', 'cls' or 'last'"),
        (TASKS, {"max_num_batched_tokens": 256}, "one step, and the longest text has max_model_len = 2048 tokens"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_vllm_is_imported(
    tmp_path: Path, tasks: tuple[str, ...], table: dict[str, JsonValue], named: str
) -> None:
    write_mlx(tmp_path, Shape(head_dim=64))
    assert named in refusal(load_command(tmp_path, *tasks, **table))


def test_the_server_has_vllm_embed_what_a_card_says_is_for_that(tmp_path: Path) -> None:
    write_mlx(tmp_path / "tiny", Shape(head_dim=64))
    table: dict[str, JsonValue] = {"path": str(tmp_path / "tiny"), "dtype": "float32", "threads": 1}
    write_card(tmp_path, "tiny", {"vllm": table}, backends=["Vllm"], tasks=[*TASKS])
    with ServeProgram(tmp_path) as server:
        reply = server.client.post("/v1/embeddings", json={"model": "tiny", "input": ["a text", "another text"]})
        assert (reply.status_code, reply.headers["x-exo-runner"]) == (200, "vllm")
        found = [each["embedding"] for each in reply.json()["data"]]
        assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1], abs=1e-6)
        assert reply.json()["usage"]["prompt_tokens"] > 2
        refused = server.complete("tiny", max_tokens=1)
        assert refused.status_code == 400
        assert "is for TextEmbedding" in refused.json()["error"]["message"]


def write_encoder(folder: Path, encoder: Encoder) -> None:
    """As Hugging Face has BERT; with a tokenizer that is not its own, as the test gives token ids."""
    write_mlx(folder, Shape(head_dim=64))
    names = {
        "token_embd": "embeddings.word_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "position_embd": "embeddings.position_embeddings",
        "token_embd_norm": "embeddings.LayerNorm",
        "attn_q": "attention.self.query",
        "attn_k": "attention.self.key",
        "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense",
        "attn_output_norm": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense",
        "ffn_down": "output.dense",
        "layer_output_norm": "output.LayerNorm",
    }

    def renamed(key: str) -> str:
        *block, name, kind = key.split(".")
        return ".".join([*(["encoder.layer", block[1]] if block else []), names[name], kind])

    save_file({renamed(key): matrix for key, matrix in encoder.weights.items()}, folder / "model.safetensors")
    sizes = {"hidden_size": encoder.hidden, "intermediate_size": encoder.feed_forward, "vocab_size": len(VOCABULARY)}
    counts = {"num_hidden_layers": encoder.layers, "num_attention_heads": encoder.heads, "type_vocab_size": 2}
    kind = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu_pytorch_tanh"}
    length = {"max_position_embeddings": encoder.context_length, "layer_norm_eps": NORM_EPS}
    (folder / "config.json").write_text(json.dumps({**kind, **sizes, **counts, **length}))


def test_an_encoders_vectors_are_those_of_its_definition(tmp_path: Path) -> None:
    encoder = Encoder(hidden=128, heads=2, context_length=512)
    write_encoder(tmp_path, encoder)
    texts = [(CLS, *(5 + at * at % 50 for at in range(length)), SEP) for length in (1, 9, 100, 510)]
    with embedding(tmp_path) as program:
        assert program.capabilities is not None
        assert program.capabilities.context_length == 512
        results = program.generate(*(Embed(id=next(name), prompt=text) for text in texts))
    for text, result in zip(texts, results, strict=True):
        assert np.abs(encoder.vector(text, "mean") - np.array(result.embedded.vector)).max() < 1e-5
