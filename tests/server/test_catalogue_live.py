"""Cards that are edited, added and removed while a program runs."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from exo.cards.catalogue import BrokenCard, Catalogue, LiveCatalogue
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.model_cards import write
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf


def live(directory: Path) -> LiveCatalogue:
    return LiveCatalogue(Catalogue.load(directory), every_seconds=0)


def layers(catalogue: Catalogue, name: str) -> int | None:
    card = catalogue.get(name)
    return card.n_layers if card is not None else None


def test_cards_that_come_change_and_go(tmp_path: Path) -> None:
    catalogue = live(tmp_path / "cards")
    assert catalogue.current() is catalogue.current()
    (tmp_path / "cards" / "below").mkdir(parents=True)
    path = write(tmp_path / "cards" / "below", "a.toml", "me/a", "a", layers=2)
    assert layers(catalogue.current(), "a") == 2
    write(tmp_path / "cards" / "below", "a.toml", "me/a", "b", layers=3)
    assert layers(catalogue.current(), "b") == 3
    assert layers(catalogue.current(), "a") is None
    path.unlink()
    assert layers(catalogue.current(), "me/a") is None
    assert catalogue.current() is catalogue.current()


def test_a_change_that_keeps_size_and_date_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "me/a", layers=2)
    catalogue, was = live(tmp_path), path.stat()
    fresh = write(tmp_path, "a.new", "me/a", layers=7)
    os.utime(fresh, ns=(was.st_atime_ns, was.st_mtime_ns))
    fresh.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert layers(catalogue.current(), "me/a") == 7


def test_a_broken_edit_keeps_the_card_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "a.toml", "me/a", "a", layers=2)
    write(tmp_path, "b.toml", "me/b")
    catalogue = live(tmp_path)
    path.write_text(path.read_text().replace("n_layers = 2", "n_layers = 0"))
    with caplog.at_level(logging.WARNING):
        broken = catalogue.current()
        assert catalogue.current() is broken
    assert layers(broken, "a") == 2
    (problem,) = broken.problems
    assert (problem.file, problem.key) == (str(path), "n_layers")
    assert problem.reason.endswith("; the card stays as it was before this change")
    assert [record.getMessage() for record in caplog.records] == [f"model card {problem}"]
    path.write_text("n_layers = 3 [")
    assert [problem.key for problem in catalogue.current().problems] == [""], "the old problem has gone"
    assert layers(catalogue.current(), "a") == 2
    write(tmp_path, "a.toml", "me/a", "a", layers=5)
    assert catalogue.current().problems == ()
    assert layers(catalogue.current(), "a") == 5


def test_a_broken_card_is_gone_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "me/a")
    catalogue = live(tmp_path)
    path.write_text("broken")
    assert layers(catalogue.current(), "me/a") == 2
    path.unlink()
    assert layers(catalogue.current(), "me/a") is None
    assert catalogue.current().problems == ()


def test_a_card_that_comes_into_conflict_is_told(tmp_path: Path) -> None:
    first = write(tmp_path, "a.toml", "me/a", "it")
    catalogue = live(tmp_path)
    second = write(tmp_path, "b.toml", "me/b", "it")
    assert catalogue.current().get("it") is None
    assert catalogue.current().problems == (
        BrokenCard(str(first), "aliases", f"it is also a name of me/b ({second})"),
        BrokenCard(str(second), "aliases", f"it is also a name of me/a ({first})"),
    )


def test_the_files_are_looked_at_no_more_than_asked_for(tmp_path: Path) -> None:
    catalogue = LiveCatalogue(Catalogue.load(tmp_path), every_seconds=3600)
    write(tmp_path, "a.toml", "me/a")
    assert layers(catalogue.current(), "me/a") is None


def test_a_directory_that_is_slow_to_read_holds_up_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, is_read = threading.Event(), threading.Event()

    def refreshed(catalogue: Catalogue) -> Catalogue:
        looked.set()
        is_read.wait(DEADLINE_SECONDS)
        return catalogue

    monkeypatch.setattr(Catalogue, "refreshed", refreshed)
    with serve(tmp_path, fake_card()) as url:
        try:
            for _ in range(300):
                assert httpx.get(f"{url}/v1/models", timeout=DEADLINE_SECONDS / 2).status_code == 200
                if looked.wait(0.1):
                    break
            assert looked.is_set()
            assert httpx.get(f"{url}/v1/models", timeout=DEADLINE_SECONDS / 2).status_code == 200
        finally:
            is_read.set()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not reached():
        assert time.monotonic() < deadline


def test_a_server_follows_its_users_cards_and_goes_on_with_what_is_loaded(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write_gguf(model, Shape())
    write_card(tmp_path, "tiny", {"cuda": {"path": str(model), "threads": 1, "n_ctx": 512, "slots": 1}})
    cards = tmp_path / "custom_model_cards"
    with ServeProgram(tmp_path) as server:
        names = lambda: {model["id"] for model in server.client.get("/v1/models").json()["data"]}  # noqa: E731
        assert "test/tiny" in names()
        assert server.complete("tiny", max_tokens=1).status_code == 200
        (runner,) = server.runners()
        text = (cards / "tiny.toml").read_text()
        (cards / "tiny.toml").write_text(text.replace("slots = 1", "slots = 2").replace('["tiny"]', '["small"]'))
        until(lambda: server.complete("small", max_tokens=1).status_code == 200)
        assert server.complete("tiny", max_tokens=1).status_code == 404
        until(lambda: runner.pid not in [each.pid for each in server.runners()])
        (runner,) = server.runners()  # by the edited card
        (cards / "tiny.toml").write_text("broken")
        until(lambda: "test/tiny" in names() and "not TOML" in server.log.read_text())
        assert server.complete("small", max_tokens=1).status_code == 200
        assert [each.pid for each in server.runners()] == [runner.pid], "nothing was loaded again"
        (cards / "tiny.toml").unlink()
        until(lambda: "test/tiny" not in names())
        reply = server.complete("test/tiny", max_tokens=1)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert [each.pid for each in server.runners()] == [runner.pid]
        assert [each["name"] for each in server.client.get("/api/ps").json()["models"]] == ["test/tiny"]
        assert [each["model"] for each in server.client.get("/v1/instances").json()["data"]] == ["test/tiny"]
        body = {"model": "small:latest", "keep_alive": 0}
        for path in ("/api/generate", "/api/chat"):
            assert server.client.post(path, json={**body, "model": "tiny"}).status_code == 404
        reply = server.client.post("/api/generate", json=body)
        assert (reply.status_code, reply.json()["model"], reply.json()["done_reason"]) == (200, "test/tiny", "unload")
        assert server.runners() == []
        assert server.client.get("/api/ps").json() == {"models": []}
        assert server.client.post("/api/generate", json=body).status_code == 404
        assert server.client.post("/v1/models/unload", json={"model": "small"}).status_code == 404
