"""The description of the API at ``/docs``, in a browser."""

from collections.abc import Generator

import httpx
import pytest
from playwright.sync_api import expect

from exo.config import Access, ApiKey
from tests.conftest import fake_card
from tests.page.conftest import DEADLINE_MILLISECONDS, Visitor
from tests.page.test_views import AXE
from tests.support.api_server import serve

expect.set_options(timeout=DEADLINE_MILLISECONDS)

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server with a key, which the page does not need."""
    access = Access(keys=(ApiKey("alice", KEY),))
    with serve(tmp_path_factory.mktemp("server"), fake_card("fake/model"), access=access) as url:
        yield url


def test_every_route_and_every_field_is_listed(url: str, visitor: Visitor) -> None:
    document = httpx.get(f"{url}/openapi.json", headers={"x-api-key": KEY}).json()
    page = visitor.open(f"{url}/docs")
    named = page.locator("summary strong").all_text_contents()
    routes = [f"{method.upper()} {path}" for path, operations in document["paths"].items() for method in operations]
    schemas = document["components"]["schemas"]
    assert named == [*routes, *sorted(schemas)]
    fields = page.locator("details > div[id]").evaluate_all(
        """all => all.map((each) => {
            const names = [...each.querySelectorAll("td:first-child code")].map((name) => name.textContent);
            return [each.id, names];
        })"""
    )
    assert dict(fields) == {name: list(schema.get("properties", ())) for name, schema in schemas.items()}
    chat = page.locator("#ChatCompletionRequest tr")
    expect(chat.filter(has=page.get_by_text("messages", exact=True)).first).to_contain_text("required")
    expect(chat.filter(has=page.get_by_text("temperature", exact=True)).first).to_contain_text("number from 0 to 2")


def test_a_link_opens_what_it_names(url: str, visitor: Visitor) -> None:
    page = visitor.open(f"{url}/docs", javascript=False)
    fields = page.locator("#ChatCompletionRequest")
    expect(fields).to_be_hidden()
    page.locator("summary", has_text="POST /v1/chat/completions").first.click()
    page.get_by_role("link", name="ChatCompletionRequest").click()
    expect(fields).to_be_in_viewport()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_and_a_phone_shows_it(url: str, visitor: Visitor, dark: bool) -> None:
    page = visitor.open(f"{url}/docs", width=360, dark=dark)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    page.evaluate(AXE.read_text())
    result = page.evaluate("axe.run(document)")
    assert len(result["passes"]) > 5
    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in result["violations"]] == []
    sizes = "[document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]"
    assert max(page.evaluate(sizes)) <= 360
