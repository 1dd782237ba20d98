"""The view Models: plans, engines, loading, unloading and downloads."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.conftest import fake_card
from tests.page.conftest import DEADLINE_MILLISECONDS, Visitor
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.hub import REPO, Fault, LocalHub
from tests.support.server import ServeProgram, write_card

expect.set_options(timeout=DEADLINE_MILLISECONDS)

FILE = "far-Q8_0.gguf"
CONTENT = random.Random(5).randbytes(1 << 20)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    both = {"backends": ("LlamaCppCpu", "MlxCpu"), "engines": {"cuda": {"chat_template": CHAT_TEMPLATE}}}
    cards = [
        fake_card("fake/model").model_copy(update=both),
        fake_card("fake/broken", fail_load="the file is damaged"),
        fake_card("fake/apple").model_copy(update={"backends": ("MlxMetal",), "engines": {}}),
    ]
    with serve(tmp_path_factory.mktemp("server"), *cards) as url:
        yield url


@contextmanager
def stalled_download(home: Path) -> Generator[tuple[LocalHub, str]]:
    """Yields a hub that stops in the middle of a card's file until it may go on, and the URL of a server."""
    write_card(home, "far", {"cuda": {"repo": REPO, "file": FILE}})
    with LocalHub() as hub:
        hub.commit({FILE: CONTENT})
        hub.state.faults = [Fault("stall", at=len(CONTENT) // 2)]
        with ServeProgram(home, HF_ENDPOINT=hub.url) as server:
            yield hub, server.url


def row(page: Page, model: str) -> Locator:
    page.get_by_label("Find a model").fill(model)
    found = page.locator("details.model", has_text=model).filter(visible=True)
    expect(found).to_have_count(1)
    found.locator("summary").click()
    return found


def test_a_model_is_loaded_and_unloaded(url: str, visitor: Visitor) -> None:
    page = visitor.open(f"{url}/#models")
    expect(page).to_have_title("Models \u00b7 exo")
    model = row(page, "fake/model")
    model.get_by_role("button", name="Load", exact=True).click()
    expect(model.get_by_role("status")).to_have_text("It is loaded.")
    expect(model.locator("summary")).to_contain_text("loaded")
    expect(model.get_by_role("button", name="Load", exact=True)).to_be_hidden()
    model.get_by_role("button", name="Unload").click()
    expect(model.get_by_role("status")).to_have_text("It is unloaded.")
    expect(model.get_by_role("button", name="Load", exact=True)).to_be_visible()


def test_engines_and_plan_are_told_with_reasons(url: str, visitor: Visitor) -> None:
    page = visitor.open(f"{url}/#models")
    model = row(page, "fake/model")
    expect(model.get_by_role("listitem")).to_have_count(2)
    expect(model.get_by_role("listitem").first).to_contain_text("llama.cpp (cuda): available")
    expect(model.get_by_role("listitem").last).to_contain_text("MLX (mlx): not available")
    expect(model.locator("dl")).to_contain_text("card prefers LlamaCppCpu, which is available")
    expect(model.locator("dl")).to_contain_text("64 MiB")
    expect(page.locator("details.model").filter(visible=True)).to_have_count(1)
    apple = row(page, "fake/apple")
    expect(apple.locator("dl")).to_contain_text("none here")


def test_a_failed_load_says_why(url: str, visitor: Visitor) -> None:
    visitor.expected = ("status of 503",)
    page = visitor.open(f"{url}/#models")
    model = row(page, "fake/broken")
    model.get_by_role("button", name="Load", exact=True).click()
    expect(model.get_by_role("status")).to_contain_text("the file is damaged")


def test_a_download_shows_its_progress(tmp_path: Path, visitor: Visitor) -> None:
    with stalled_download(tmp_path) as (hub, url):
        page = visitor.open(f"{url}/#models")
        model = row(page, "test/far")
        expect(model.locator("summary")).to_contain_text("not on disk")
        model.get_by_role("button", name="Download").click()
        expect(model.get_by_role("status")).to_contain_text("downloading: ")
        expect(model.get_by_role("status")).to_contain_text("of 1 MiB")
        expect(model.get_by_role("progressbar")).to_be_visible()
        expect(model.get_by_role("button", name="Cancel")).to_be_visible()
        hub.state.go_on.set()
        expect(model.get_by_role("status")).to_have_text("It is on disk.")
        expect(model.locator("summary")).to_contain_text("on disk")
        expect(model.get_by_role("progressbar")).to_be_hidden()
        expect(model.get_by_role("button", name="Load", exact=True)).to_be_visible()
        page.close()  # it would ask a server that is gone
    assert (tmp_path / "models" / REPO.replace("/", "--") / FILE).read_bytes() == CONTENT


def test_a_download_can_be_cancelled(tmp_path: Path, visitor: Visitor) -> None:
    with stalled_download(tmp_path) as (hub, url):
        page = visitor.open(f"{url}/#models")
        model = row(page, "test/far")
        model.get_by_role("button", name="Download").click()
        expect(model.get_by_role("status")).to_contain_text("downloading: ")
        model.get_by_role("button", name="Cancel").click()
        expect(model.get_by_role("status")).to_contain_text("The download is cancelled")
        expect(model.get_by_role("button", name="Download")).to_be_visible()
        page.close()
        hub.state.go_on.set()
