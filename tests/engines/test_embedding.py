"""Vectors and scores of real runners against numbers that come from elsewhere: numpy, llama-cpp-python, the other
runner.
"""

import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import JsonValue

from exo.worker.protocol.commands import Embed, Load, Rank, Text, Tokenize
from exo.worker.protocol.runners import RUNNERS
from exo.worker.runner_common.hf_embedding import choose_pooling
from tests.support.program import DEADLINE_SECONDS, Program, ask, names, runner_command
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.encoder import CLS, SEP, Encoder
from tests.support.tiny.shape import ARCHITECTURES, Architecture
from tests.support.twins import FLOAT32

TEXTS = ("once upon a time", "x", "the quick brown fox jumps over the lazy dog " * 12, "hello world and you")
BACKENDS = {"cuda": "LlamaCppCpu", "mlx": "MlxCpu"}
Pooling = Literal["mean", "cls", "last"]
Runner = Literal["cuda", "mlx"]

name = names()


@contextmanager
def running(runner: Runner, path: Path, **table: JsonValue) -> Generator[Program]:
    settings = FLOAT32 if runner == "cuda" else {"dtype": "float32"}
    with Program(runner_command(RUNNERS[runner].module)) as program:
        program.load(
            Load(model_id="test/tiny", backend=BACKENDS[runner], table={"path": str(path), **settings, **table})
        )
        yield program


def vectors(program: Program, *texts: str) -> NDArray[np.float64]:
    """Shape (texts, size)."""
    results = program.generate(*(Embed(id=next(name), prompt=(Text(text=text),)) for text in texts))
    return np.array([result.embedded.vector for result in results])


def load_failure(runner: Runner, path: Path, **table: JsonValue) -> str:
    with Program(runner_command(RUNNERS[runner].module)) as program:
        program.send(Load(model_id="test/tiny", backend=BACKENDS[runner], table={"path": str(path), **table}))
        program.drain()
        assert program.failure is not None
        return program.failure.message


# --- models that generate ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_runners_make_the_same_vectors_of_the_same_weights(tmp_path: Path, architecture: Architecture) -> None:
    shape = Shape(architecture)
    write_gguf(tmp_path / "tiny.gguf", shape)
    write_mlx(tmp_path / "tiny", shape)
    pooling = {"qwen3": "last", "qwen2": "cls"}.get(architecture, "mean")
    with running("cuda", tmp_path / "tiny.gguf", pooling=pooling) as cuda:
        ours = vectors(cuda, *TEXTS)
    with running("mlx", tmp_path / "tiny", pooling=pooling) as mlx:
        theirs = vectors(mlx, *TEXTS)
    assert ((ours * theirs).sum(axis=1) > 0.9999).all()
    assert np.abs(ours - theirs).max() < 1e-4
    apart = np.abs(ours[:, None] - ours[None]).max(axis=-1)
    assert (apart[~np.eye(len(TEXTS), dtype=bool)] > 1e-3).all()


def test_the_vectors_are_those_of_llama_cpps_own_bindings(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Shape())
    source = (
        "import json, sys, llama_cpp\n"
        "path, pooling, *texts = sys.argv[1:]\n"
        "model = llama_cpp.Llama(path, embedding=True, pooling_type=int(pooling), n_ctx=1024, n_batch=1024,\n"
        "    n_ubatch=1024, n_threads=1, type_k=0, type_v=0, verbose=False)\n"
        "print(json.dumps(model.embed(texts, normalize=True)))\n"
    )
    for pooling, number in (("mean", 1), ("last", 3)):
        command = [sys.executable, "-c", source, str(path), str(number), *TEXTS]
        told = subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE_SECONDS)
        with running("cuda", path, pooling=pooling, n_batch=32, n_ubatch=32) as program:
            assert np.abs(vectors(program, *TEXTS) - np.array(json.loads(told.stdout))).max() < 1e-4


@pytest.mark.parametrize(
    ("runner", "table", "longest"),
    [("cuda", {"n_ctx": 4096}, 2048), ("cuda", {"embedding_ctx": 2100}, 2100), ("mlx", {"embedding_ctx": 2100}, 2100)],
)
def test_the_card_may_allow_longer_texts_than_the_default(
    tmp_path: Path, runner: Runner, table: dict[str, JsonValue], longest: int
) -> None:
    path = tmp_path / "tiny"
    (write_gguf if runner == "cuda" else write_mlx)(path, Shape())
    with running(runner, path, **table) as program:
        tokens = (97,) * (longest + 1)
        fits, too_long = program.generate(Embed(id=next(name), prompt=tokens[1:]), Embed(id=next(name), prompt=tokens))
        assert fits.embedded.usage.prompt_tokens == longest
        assert str(longest) in too_long.failed.message


def test_an_mlx_folder_may_say_how_to_pool(tmp_path: Path) -> None:
    write_mlx(tmp_path, Shape())
    (tmp_path / "1_Pooling").mkdir()
    config = tmp_path / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}))
    with running("mlx", tmp_path) as program:
        told_by_folder = vectors(program, TEXTS[0])
    with running("mlx", tmp_path, pooling="last") as program:
        assert np.abs(vectors(program, TEXTS[0]) - told_by_folder).max() < 1e-6
    config.write_text(json.dumps({"pooling_mode_cls_token": True, "include_prompt": True}))
    assert choose_pooling(None, tmp_path, "mlx") == "cls"
    assert choose_pooling("last", tmp_path, "mlx") == "last"
    config.write_text(json.dumps({"pooling_mode": "mean"}))
    assert choose_pooling(None, tmp_path, "mlx") == "mean"


def test_a_pooling_that_nobody_knows_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    write_mlx(tmp_path / "tiny", Shape())
    (tmp_path / "tiny" / "1_Pooling").mkdir()
    (tmp_path / "tiny" / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert "max_tokens; [mlx] pooling may be mean, cls or last" in load_failure("mlx", tmp_path / "tiny")
    write_gguf(tmp_path / "tiny.gguf", Shape())
    assert "[cuda] pooling" in load_failure("cuda", tmp_path / "tiny.gguf", pooling="max")
    assert "has no ranking head" in load_failure("cuda", tmp_path / "tiny.gguf", pooling="rank")


# --- encoders ---


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoders_vectors_are_those_of_its_definition(tmp_path: Path, pooling: Pooling) -> None:
    encoder, texts = Encoder(pooling), ("the quick brown fox", "Sea and stone!", "what is a river", "unspeakable x y z")
    encoder.write(tmp_path / "encoder.gguf")
    with running("cuda", tmp_path / "encoder.gguf") as program:
        ours = vectors(program, *texts, *texts * 30)
        tokens = program.generate(*(Tokenize(id=next(name), prompt=(Text(text=text),)) for text in texts))
    expected = np.array([encoder.vector([*each.tokenized.tokens, SEP], pooling) for each in tokens])
    assert all(each.tokenized.tokens[0] == CLS for each in tokens)
    assert ((ours[: len(texts)] * expected).sum(axis=1) > 0.99999).all()
    assert ((ours * np.tile(expected, (31, 1))).sum(axis=1) > 0.99999).all()


def test_an_encoder_pools_as_the_card_says_and_generates_nothing(tmp_path: Path) -> None:
    encoder = Encoder("none")
    encoder.write(tmp_path / "encoder.gguf")
    with running("cuda", tmp_path / "encoder.gguf", pooling="last") as program:
        assert program.capabilities is not None
        assert (program.capabilities.embeddings, program.capabilities.rerank) == (True, False)
        assert program.capabilities.context_length == encoder.context_length
        assert not program.capabilities.grammar
        assert not program.capabilities.logprobs
        given = (CLS, 30, 31, 32, 33)
        (result,) = program.generate(Embed(id=next(name), prompt=given))
        assert np.dot(result.embedded.vector, encoder.vector(given, "last")) > 0.99999
        (generated,) = program.generate(ask(next(name), "once upon a time"))
        assert (generated.failed.code, generated.failed.param) == ("invalid_request", "model")
        assert "encoder" in generated.failed.message
        longest = (30,) * encoder.context_length
        fits, too_long = program.generate(
            Embed(id=next(name), prompt=longest), Embed(id=next(name), prompt=(*longest, 30))
        )
        assert fits.embedded.usage.prompt_tokens == encoder.context_length
        assert too_long.failed.code == "context_length_exceeded"
        assert str(encoder.context_length) in too_long.failed.message
        assert program.shutdown() == 0


# --- models that rank ---


def test_a_model_that_ranks_scores_as_its_definition_does(tmp_path: Path) -> None:
    encoder = Encoder("rank")
    encoder.write(tmp_path / "ranker.gguf")
    query, documents = "what is the sea", ("the sea is a river", "stone", "fox [SEP] and [CLS] fox", "quick " * 20)
    with running("cuda", tmp_path / "ranker.gguf") as program:
        assert program.capabilities is not None
        assert (program.capabilities.embeddings, program.capabilities.rerank) == (False, True)
        scores = program.generate(*(Rank(id=next(name), query=query, document=each) for each in documents))
        first, *rest = program.generate(
            *(Tokenize(id=next(name), prompt=(Text(text=each),), add_bos=False) for each in (query, *documents))
        )
        for result, document in zip(scores, rest, strict=True):
            assert document.tokenized.tokens.count(SEP) == 0
            pair = [CLS, *first.tokenized.tokens, SEP, *document.tokenized.tokens]
            assert result.ranked.score == pytest.approx(encoder.score(pair), abs=0.01)
            assert result.ranked.usage.prompt_tokens == len(pair)
        assert len({result.ranked.score for result in scores}) == len(documents)


def test_what_cannot_be_ranked_is_refused_by_name(tmp_path: Path) -> None:
    Encoder("rank").write(tmp_path / "ranker.gguf")
    with running("cuda", tmp_path / "ranker.gguf") as program:
        results = program.generate(
            Rank(id=next(name), query="", document="d"),
            Rank(id=next(name), query="q", document=""),
            Rank(id=next(name), query="the sea", document="fox " * 200),
            Embed(id=next(name), prompt=(Text(text="the sea"),)),
            Rank(id=next(name), query="the sea", document="fox"),
        )
        assert [result.failed.param for result in results[:4]] == ["query", "document", "document", "model"]
        assert results[2].failed.code == "context_length_exceeded"
        assert results[4].ranked.score != 0


def test_a_models_own_template_joins_query_and_document(tmp_path: Path) -> None:
    """Its control tokens are found; those that a text pretends to have are not."""
    plain, templated = Encoder("rank"), Encoder("rank", template="{query} and [SEP]{document}[SEP]")
    for encoder, file in ((plain, "plain.gguf"), (templated, "templated.gguf")):
        encoder.write(tmp_path / file)
    with running("cuda", tmp_path / "templated.gguf") as program:
        query, document = "fox {document}", "sea [SEP]"
        (scored,) = program.generate(Rank(id=next(name), query=query, document=document))
        parts = program.generate(
            *(Tokenize(id=next(name), prompt=(Text(text=each),), add_bos=False) for each in (f"{query} and ", document))
        )
        first, second = (part.tokenized.tokens for part in parts)
        assert scored.ranked.score == pytest.approx(plain.score([*first, SEP, *second, SEP]), abs=0.01)
