"""``exo show``: the card, what is on disk, and which engines could serve it."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.cli.models.show import ShownModel, render, show_model
from exo.store.store import Store
from exo.worker.host import Host
from exo.worker.protocol.probe import Probe
from tests.support.hub import LocalHub
from tests.support.model_cards import SMALL
from tests.support.pulling import gguf_card, hub_at, pull_card

CPU = Probe(installed=True, engine="llama.cpp", backends=("LlamaCppCpu",))
NONE = Probe(installed=False, engine="MLX", notes=("no module named mlx",), remedy="install exo[mlx]")


def host(probes: Mapping[str, Probe]) -> Host:
    return Host("Linux", "x86_64", 4, 8 << 30, 4 << 30, (), probes)


def shown(name: str, directory: Path, probes: Mapping[str, Probe], models: Path | None = None) -> ShownModel:
    catalogue = Catalogue.load(directory)
    card = catalogue.get(name)
    assert card is not None
    return show_model(card, catalogue, Store([models or directory / "models"]), host(probes))


def text_of(model: ShownModel) -> str:
    out = Console(file=StringIO(), width=1000)
    render(model, out)
    assert isinstance(out.file, StringIO)
    return out.file.getvalue()


def test_which_engines_could_serve_a_model_and_why_the_others_not(tmp_path: Path) -> None:
    model = shown("qwen3:8b", tmp_path, {"cuda": CPU, "mlx": NONE})
    assert (model.card.model_id, model.route) == ("Qwen/Qwen3-8B", "cuda")
    cuda, mlx = model.engines
    assert (cuda.runner, cuda.backend, cuda.state) == ("cuda", "LlamaCppCpu", "absent")
    assert cuda.source == "Qwen/Qwen3-8B-GGUF: Qwen3-8B-Q4_K_M.gguf"
    assert (mlx.runner, mlx.backend, mlx.source) == ("mlx", None, "mlx-community/Qwen3-8B-4bit")
    assert "which is not installed here" in mlx.reason
    assert "install exo[mlx]" in mlx.reason
    text = text_of(model)
    for part in ("36 layers of 4096, 8 key/value heads", "40,960 tokens", "qwen3:8b", "sampling not thinking"):
        assert part in text
    assert "install exo[mlx]" in text, "brackets are no markup"


def test_a_model_that_nothing_here_can_serve(tmp_path: Path) -> None:
    model = shown("nomic-embed-text", tmp_path, {"cuda": NONE, "mlx": CPU})
    assert model.route is None
    (engine,) = model.engines
    assert engine.backend is None
    assert "runner cuda, which is not installed here" in model.reason
    assert "none: no runner can serve" in text_of(model)


@pytest.mark.parametrize("task", ["TextEmbedding", "TextRanking", "TextToImage"])
def test_each_model_is_asked_about_for_what_it_is_for(tmp_path: Path, task: str) -> None:
    (tmp_path / "a.toml").write_text(SMALL.replace("TextGeneration", task))
    model = shown("someone/small", tmp_path, {"cuda": CPU, "mlx": NONE})
    assert (model.route is None) is (task == "TextToImage")


async def test_what_is_on_disk(tmp_path: Path) -> None:
    with LocalHub() as hub:
        commit = hub.commit({"a-Q4_K_M.gguf": bytes(3000)})
        card = gguf_card("*Q4_K_M.gguf", "someone/small")
        store = Store([tmp_path / "models"])
        await pull_card(card, store, hub_at(hub.url))
    (tmp_path / "a.toml").write_text(f'{SMALL}\n[cuda]\nrepo = "org/model"\nfile = "*Q4_K_M.gguf"\n')
    model = shown("someone/small", tmp_path, {"cuda": CPU, "mlx": NONE})
    (engine,) = model.engines
    assert (engine.state, engine.bytes, engine.total, engine.revision) == ("present", 3000, 3000, commit)
    path = tmp_path / "models" / "org--model" / "a-Q4_K_M.gguf"
    assert engine.path == str(path)
    assert f"yes, 0.00 GB, {path}, revision {commit[:12]}" in text_of(model)
    path.write_bytes(bytes(1000))
    (engine,) = shown("someone/small", tmp_path, {"cuda": CPU, "mlx": NONE}).engines
    assert (engine.state, engine.total) == ("partial", 3000)


def test_a_broken_table_is_told_and_so_is_a_broken_edit(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f"{SMALL}\n[cuda]\nrepo = 3\n")
    catalogue = Catalogue.load(tmp_path)
    path.write_text("broken")
    after = catalogue.refreshed()
    card = after.get("someone/small")
    assert card is not None
    model = show_model(card, after, Store([tmp_path]), host({"cuda": CPU}))
    assert model.file == str(path)
    assert len(model.problems) == 1
    assert "the card stays as it was" in text_of(model)
    assert (model.engines[0].backend, model.engines[0].state) == (None, None)
    assert "[cuda] repo" in model.engines[0].reason


def test_programs_read_the_same(tmp_path: Path) -> None:
    model = shown("qwen3:8b", tmp_path, {"cuda": CPU, "mlx": NONE})
    assert ShownModel.model_validate_json(model.model_dump_json()) == model
    assert isinstance(model.card, ModelCard)
