"""The views Now and Compare, and what holds for all views: keyboard, narrow screens, accessibility, both schemes."""

import os
import signal
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.conftest import fake_card
from tests.page.conftest import DEADLINE_MILLISECONDS, Visitor
from tests.server.test_failover import AS_MLX
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.fake_runner import COMMAND
from tests.support.hosts import FakeHost, wait_until, write_hosts
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf

expect.set_options(timeout=DEADLINE_MILLISECONDS)

VIEWS = ("chat", "models", "now", "compare")
AXE = Path(str(distribution("axe-playwright-python").locate_file("axe_playwright_python/axe.min.js")))
HOSTILE = "<img/src=x/onerror=document.title='taken'><script>document.title='taken'</script>"
ENDLESS = {"model": "fake/slow", "prompt": "hi", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}
WIDE = "a" * 300 + "\n\n```\n" + "b" * 300 + "\n```\n\n|" + "c" * 80 + "|" + "d" * 80 + "|\n|---|---|\n|1|2|\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    table = {"chat_template": CHAT_TEMPLATE, "eos_after": 30}
    both = {"backends": ("LlamaCppCpu", "MlxCpu"), "engines": {"cuda": table, "mlx": table}}
    cards = [
        fake_card("fake/both").model_copy(update=both),
        fake_card("fake/wide", chat_template=CHAT_TEMPLATE, answer=WIDE),
        fake_card("fake/slow", step_seconds=0.02, slots=1),
        fake_card("fake/hostile", chat_template=CHAT_TEMPLATE, fail_load=HOSTILE),
    ]
    commands = {"cuda": COMMAND, "mlx": AS_MLX}
    with serve(tmp_path_factory.mktemp("server"), *cards, commands=commands) as url:
        yield url


def visit(page: Page, view: str) -> None:
    page.get_by_role("link", name=view.capitalize()).click()
    expect(page.locator(f"#{view}")).to_be_visible()


def test_two_engines_answer_side_by_side(url: str, visitor: Visitor) -> None:
    page = visitor.open(f"{url}/#compare")
    page.get_by_label("Model left").select_option("fake/both")
    page.get_by_label("Model right").select_option("fake/both")
    page.get_by_label("Engine left").select_option("cuda")
    page.get_by_label("Engine right").select_option("mlx")
    page.get_by_label("Prompt").fill("hello")
    page.keyboard.press("Enter")
    sides = page.locator("section.side")
    for side, runner in ((sides.first, "cuda"), (sides.last, "mlx")):
        expect(side.get_by_role("status")).to_have_text("Answer finished")
        expect(side.locator(".facts")).to_contain_text(f"{runner}: request asks for runner {runner}")
    assert sides.first.locator(".markdown").inner_text() == sides.last.locator(".markdown").inner_text() != ""


def test_a_runner_on_another_host_is_shown_with_its_host(tmp_path: Path, visitor: Visitor) -> None:
    host = FakeHost(tmp_path, "gpu2")
    write_gguf(tmp_path / "tiny.gguf", Shape())
    write_card(tmp_path / "home", "there", {"cuda": {"path": str(tmp_path / "tiny.gguf")}}, hosts=["gpu2"])
    write_hosts(tmp_path / "home", host)
    with ServeProgram(tmp_path / "home") as server:
        wait_until(lambda: 'exo:host_up{host="gpu2"} 1.0' in server.client.get("/metrics").text)
        page = visitor.open(f"{server.url}/#now")
        assert server.complete("there", max_tokens=1).status_code == 200
        expect(page.get_by_role("region", name="Runners")).to_contain_text("test/there@cuda@gpu2")
        expect(page.get_by_role("region", name="Requests")).to_contain_text("cuda@gpu2: ")
    wait_until(lambda: not [*host.processes()])


def test_requests_deaths_and_replays_are_seen_as_they_happen(url: str, visitor: Visitor) -> None:
    page = visitor.open(f"{url}/#now")
    requests = page.get_by_role("region", name="Requests").locator("tbody tr")
    with httpx.Client(base_url=url, timeout=None) as client, ThreadPoolExecutor() as pool:
        try:
            asked = [pool.submit(client.post, "/v1/completions", json=ENDLESS, headers={"x-request-id": "one"})]
            expect(requests.filter(has_text="decode")).to_have_count(1)
            asked.append(pool.submit(client.post, "/v1/completions", json=ENDLESS, headers={"x-request-id": "two"}))
            expect(requests.filter(has_text="queued")).to_have_count(1)
            expect(page.get_by_role("region", name="Runners")).to_contain_text("1 of 1")
            expect(page.locator(".memory")).to_contain_text(["RAM: "])
            expect(page.get_by_role("img", name="Tokens per second of fake/slow")).to_be_visible()
            (pid,) = (each["pid"] for each in client.get("/v1/instances").json()["data"] if each["active"])
            os.kill(pid, signal.SIGKILL)
            incidents = page.get_by_role("list", name="Deaths and replays")
            expect(incidents).to_contain_text("fake/slow on cuda died (runner_died)")
            expect(incidents).to_contain_text("fake/slow: request one continues after")
        finally:
            for name in ("one", "two"):
                client.post(f"/v1/cancel/{name}")
    assert [each.result().status_code for each in asked] == [409, 409]
    expect(requests.filter(has_text="cancelled")).to_have_count(2)


def test_what_a_client_says_of_itself_is_only_shown(url: str, visitor: Visitor) -> None:
    page = visitor.open(f"{url}/#now")
    title = page.title()
    headers = {"user-agent": HOSTILE, "x-request-id": "hostile"}
    body = {"model": "fake/both", "prompt": "x", "max_tokens": 1}
    with httpx.Client(base_url=url, timeout=None) as client:
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        expect(page.get_by_role("region", name="Requests")).to_contain_text("document.title='taken'")
    assert page.locator("main img, main script").count() == 0
    assert page.title() == title


def test_what_a_failed_load_and_a_plan_say_is_only_shown(url: str, visitor: Visitor) -> None:
    """A runner's error may quote a model's file, and a plan names devices and hosts."""
    visitor.expected = ("status of 503",)
    plan = {"problem": HOSTILE, "slots": 1, "layers": {HOSTILE: 1}, "memory": {HOSTILE: 1}, "notes": [HOSTILE]}
    page = visitor.open(f"{url}/#models")
    engines = {"engines": [{"runner": HOSTILE, "available": True, "reason": HOSTILE}]}
    page.route("**/v1/engines?*", lambda route: route.fulfill(json=engines))
    page.route("**/v1/route?*", lambda route: route.fulfill(json={"runner": "cuda", "reason": HOSTILE, "plan": plan}))
    model = page.locator("details.model", has_text="fake/hostile")
    model.locator("summary").click()
    model.get_by_role("button", name="Load", exact=True).click()
    expect(model.get_by_role("status")).to_contain_text(HOSTILE)
    expect(model.get_by_role("listitem")).to_contain_text(HOSTILE)
    expect(model.locator("dl").get_by_text(HOSTILE)).to_have_count(5)
    visit(page, "chat")
    page.get_by_label("Model", exact=True).select_option("fake/hostile")
    page.get_by_label("Message", exact=True).fill("hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(HOSTILE)
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Chat \u00b7 exo"


def test_text_stays_selected_while_requests_come(url: str, visitor: Visitor) -> None:
    page = visitor.open(f"{url}/#now")
    rows = page.get_by_role("region", name="Requests").locator("tbody tr")

    def ask(name: str) -> None:
        body = {"model": "fake/both", "prompt": "x", "max_tokens": 1}
        reply = httpx.post(f"{url}/v1/completions", json=body, headers={"user-agent": name}, timeout=None)
        assert reply.status_code == 200
        expect(rows.filter(has_text=name)).to_be_visible()

    ask("selected-1")
    rows.filter(has_text="selected-1").evaluate("row => getSelection().selectAllChildren(row)")
    ask("selected-2")
    assert "selected-1" in page.evaluate("getSelection().toString()")


def test_a_tab_that_nobody_sees_asks_for_nothing_and_catches_up(url: str, visitor: Visitor) -> None:
    def turn(hidden: str) -> None:  # what a browser does when its user changes tabs
        page.evaluate(f"Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    page, other = visitor.open(f"{url}/#now"), visitor.open(f"{url}/#now")
    rows, seen = (each.get_by_role("region", name="Requests").locator("tbody") for each in (page, other))
    turn("true")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name in ("unseen-1", "unseen-2"):
        body = {"model": "fake/both", "prompt": "x", "max_tokens": 1}
        reply = httpx.post(f"{url}/v1/completions", json=body, headers={"user-agent": name}, timeout=None)
        assert reply.status_code == 200
        expect(seen).to_contain_text(name)
    assert "unseen-1" not in rows.inner_text()
    assert asked == []
    turn("false")
    expect(rows).to_contain_text("unseen-2")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_in_any_view(url: str, visitor: Visitor, dark: bool) -> None:
    page = visitor.open(url, dark=dark)
    page.get_by_label("Model", exact=True).select_option("fake/wide")
    page.get_by_label("Message", exact=True).fill("hello")
    page.keyboard.press("Enter")
    expect(page.locator("#chat").get_by_role("status")).to_have_text("Answer finished")
    page.evaluate(AXE.read_text())
    found = {}
    for view in VIEWS:
        visit(page, view)
        if view == "models":
            page.locator("details.model summary").first.click()
            expect(page.locator("#models dl").first).to_contain_text("runner")
        result = page.evaluate("axe.run(document)")
        assert len(result["passes"]) > 5
        found[view] = [(each["id"], [node["html"] for node in each["nodes"]]) for each in result["violations"]]
    assert found == {view: [] for view in VIEWS}


def test_nothing_is_wider_than_a_phone(url: str, visitor: Visitor) -> None:
    page = visitor.open(url, width=360)
    page.get_by_label("Model", exact=True).select_option("fake/wide")
    page.get_by_label("Message", exact=True).fill("w" * 300)
    page.keyboard.press("Enter")
    expect(page.locator("#chat").get_by_role("status")).to_have_text("Answer finished")
    for view in VIEWS:
        visit(page, view)
        sizes = "[document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]"
        assert max(page.evaluate(sizes)) <= 360, view
        expect(page.get_by_role("navigation")).to_be_in_viewport()


def test_every_control_is_reached_by_keyboard_and_seen(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    expect(page.get_by_label("Model", exact=True)).to_have_value("fake/both")
    wanted = ["Chat", "Models", "Now", "Compare", "Model", "Engine", "Settings", "Conversation", "Message", "Send"]
    described = """() => {
        const focused = document.activeElement, style = getComputedStyle(focused);
        const name = focused.getAttribute("aria-label") ?? focused.labels?.[0]?.textContent ?? focused.textContent;
        return [name, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
    }"""
    reached: list[tuple[str, bool]] = []
    for _ in wanted:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(described)
        reached.append((name.split("\n")[0], seen))
    assert reached == [(name, True) for name in wanted]


def test_every_file_comes_from_the_server(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    for view in VIEWS:
        visit(page, view)
    entries = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(entries) > 10
    assert [entry for entry in entries if not entry.startswith(f"{url}/")] == []
