"""A card's draft model is another repository's file: pulled with the model, and shown beside it."""

from pathlib import Path

import pytest

from exo.cards.card import ModelCard
from exo.cards.catalogue import Catalogue
from exo.cli.models.show import EngineRow, show_model
from exo.store.errors import PullError
from exo.store.file_selection import Source
from exo.store.store import Store
from exo.worker.host import Host
from tests.conftest import fake_card
from tests.support.hub import REPO, LocalHub
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf

DRAFT_REPO = "org/small"


def write_pair(home: Path, draft: str = "*Q4_K_M.gguf") -> None:
    table = {"repo": REPO, "file": "*Q8_0.gguf", "n_ctx": 512, "threads": 1}
    write_card(home, "pair", {"cuda": table, "cuda.draft": {"repo": DRAFT_REPO, "file": draft}})


def commit_pair(hub: LocalHub, folder: Path) -> None:
    write_gguf(folder / "model.gguf", Shape())
    write_gguf(folder / "draft.gguf", Shape(layers=1, seed=3))
    hub.commit({"model-Q8_0.gguf": folder / "model.gguf"})
    hub.commit({"small-Q4_K_M.gguf": folder / "draft.gguf"}, DRAFT_REPO)


def shown(home: Path) -> EngineRow:
    catalogue = Catalogue.load(home / "custom_model_cards")
    card = catalogue.get("pair")
    assert card is not None
    store = Store([home / "models"])
    return show_model(card, catalogue, store, Host("Linux", "x86_64", 4, 8 << 30, 4 << 30, (), {})).engines[0]


def test_a_request_waits_for_both_and_a_model_without_its_draft_model_is_not_on_disk(tmp_path: Path) -> None:
    home, draft = tmp_path / "home", tmp_path / "home" / "models" / "org--small" / "small-Q4_K_M.gguf"
    write_pair(home)
    with LocalHub() as hub:
        commit_pair(hub, tmp_path)
        with ServeProgram(home, "--auto-pull", HF_ENDPOINT=hub.url) as server:
            assert server.complete("pair", max_tokens=20).status_code == 200
        engine = shown(home)
        assert (engine.state, engine.source) == ("present", "org/model: *Q8_0.gguf")
        assert engine.draft is not None
        assert (engine.draft.state, engine.draft.path) == ("present", str(draft))
        assert engine.draft.source == "org/small: *Q4_K_M.gguf"
        draft.unlink()
        with ServeProgram(home, HF_ENDPOINT=hub.url) as server:
            error = server.complete("pair", max_tokens=2).json()["error"]
            assert error["code"] == "model_not_downloaded"
            assert "org/small, test/pair's draft model, is not on disk" in error["message"]
            assert "`exo pull test/pair --runner cuda`" in error["message"]
            pulled = server.client.post("/v1/models/pull", json={"model": "pair", "stream": False})
            assert pulled.status_code == 200
            assert server.complete("pair", max_tokens=2).status_code == 200


def card(**draft: str) -> ModelCard:
    return fake_card("test/pair", repo=REPO, file="*Q8_0.gguf", draft=dict(draft))


def test_a_draft_model_is_looked_for_in_its_own_folder() -> None:
    """Not in the model's, where a pattern such as ``*Q8_0.gguf`` would find the model itself."""
    source = Source.of_draft(card(repo=DRAFT_REPO, file="*Q8_0.gguf"), "cuda")
    assert source == Source(DRAFT_REPO, "cuda", DRAFT_REPO, file="*Q8_0.gguf")
    assert Source.of_draft(card(path="small.gguf"), "cuda") == Source("test/pair", "cuda", None, "small.gguf")
    assert Source.of_draft(fake_card("test/alone", repo=REPO, file="x.gguf"), "cuda") is None
    assert Source.of_draft(card(repo=DRAFT_REPO, file="x.gguf"), "mlx") is None


def test_a_broken_draft_table_is_told_by_its_key() -> None:
    broken = fake_card("test/pair", repo=REPO, file="*.gguf", draft={"repo": 3})
    with pytest.raises(PullError, match=r"\[cuda\] draft.repo"):
        Source.of(broken, "cuda")
