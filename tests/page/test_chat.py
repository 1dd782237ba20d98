"""The view Chat, used as a person would, in a browser."""

import json
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Request, expect

from exo.config import Access, ApiKey
from tests.conftest import fake_card
from tests.page.conftest import DEADLINE_MILLISECONDS, Visitor
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.pictures import random_png

expect.set_options(timeout=DEADLINE_MILLISECONDS)

STORY = " ".join(f"word{number}" for number in range(120))
HOSTILE = """Before.

<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"><svg onload="window.hacked = 1"></svg>

<iframe src="javascript:parent.hacked = 1"></iframe><a href="https://evil.example/" onclick="window.hacked = 1">raw</a>

[dead](javascript:window.hacked=1) [coded](javascript&#58;window.hacked=1) [data](data:text/html,<script>1</script>)
[live](https://example.org/path) ![pixel](https://evil.example/pixel.png "title") <https://example.org/auto>

```html"onmouseover="window.hacked=1
<b>code</b>
```

access \u202eevil\u202c granted

<style>body { display: none }</style><form action="https://evil.example/"><input name=q></form>
<div style="position:fixed;inset:0" id="main" class="status">over</div>

After."""
MARKDOWN = """# Title

A paragraph with `code` and **bold** text.

- one
- two

```python
print("hello")
```

| a | b |
|---|---|
| 1 | 2 |
"""
THINKS = CHAT_TEMPLATE + "<think>\n{# </think> #}"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    cards = [
        fake_card("fake/quick", chat_template=CHAT_TEMPLATE, eos_after=20),
        fake_card("fake/endless", chat_template=CHAT_TEMPLATE, step_seconds=0.01),
        fake_card("fake/story", chat_template=CHAT_TEMPLATE, answer=STORY, step_seconds=0.01),
        fake_card("fake/hostile", chat_template=CHAT_TEMPLATE, answer=HOSTILE),
        fake_card("fake/markdown", chat_template=CHAT_TEMPLATE, answer=MARKDOWN),
        fake_card("fake/thinks", chat_template=THINKS, answer="hmm, a sum</think>The answer is 4."),
        fake_card("fake/broken", chat_template=CHAT_TEMPLATE, fail_load="the file is damaged"),
    ]
    with serve(tmp_path_factory.mktemp("server"), *cards) as url:
        yield url


def ask(page: Page, model: str, text: str = "hello") -> None:
    page.get_by_label("Model", exact=True).select_option(model)
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def sent(request: Request) -> dict[str, Any]:
    return json.loads(request.post_data or "")


def status(page: Page, text: str) -> None:
    expect(page.locator("#chat").get_by_role("status")).to_have_text(text)


def wait_for_active(url: str, sequences: int) -> None:
    deadline = time.monotonic() + DEADLINE_MILLISECONDS / 1000
    while sum(each["active"] for each in httpx.get(f"{url}/v1/instances").json()["data"]) != sequences:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_answer_is_streamed_and_says_who_made_it(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    expect(page).to_have_title("Chat \u00b7 exo")
    ask(page, "fake/endless", "two\nlines")
    answer = page.get_by_role("article", name="Answer")
    expect(answer.locator(".markdown")).not_to_be_empty()
    status(page, "Answering")
    wait_for_active(url, 1)
    page.keyboard.press("Escape")
    status(page, "Answer stopped")
    expect(answer.locator(".facts")).to_contain_text("cuda: card prefers LlamaCppCpu, which is available")
    expect(answer.locator(".facts")).to_contain_text("stopped")
    expect(page.get_by_role("article", name="Question")).to_have_text("two\nlines")
    wait_for_active(url, 0)


def test_the_stop_button_keeps_the_text_and_the_conversation_goes_on(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    ask(page, "fake/endless")
    expect(page.locator(".markdown")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    status(page, "Answer stopped")
    text = page.locator(".markdown").inner_text()
    with page.expect_request("**/v1/chat/completions") as second:
        ask(page, "fake/quick", "and now?")
    status(page, "Answer finished")
    body = sent(second.value)
    assert [each["role"] for each in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"].split() == text.split()
    assert (body["model"], body["messages"][2]["content"]) == ("fake/quick", "and now?")


def test_an_answer_can_be_made_again_by_a_chosen_engine(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    ask(page, "fake/quick")
    status(page, "Answer finished")
    page.get_by_label("Engine", exact=True).select_option("cuda")
    with page.expect_request("**/v1/chat/completions") as again:
        page.get_by_role("button", name="Regenerate").click()
    body = sent(again.value)
    assert (body["model"], [each["role"] for each in body["messages"]]) == ("fake/quick@cuda", ["user"])
    expect(page.locator(".facts")).to_contain_text("request asks for runner cuda")
    expect(page.get_by_role("article", name="Answer")).to_have_count(1)
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("article")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_settings_are_sent(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    page.get_by_text("Settings").click()
    page.get_by_label("System message").fill("be brief")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("3")
    ask(page, "fake/endless")
    status(page, "Answer finished")
    expect(page.locator(".facts")).to_contain_text("3 out")
    expect(page.locator(".facts")).to_contain_text("cut off")


def test_a_killed_runner_changes_nothing_in_the_text(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    ask(page, "fake/story")
    expect(page.locator(".markdown")).to_contain_text("word3")
    instances = httpx.get(f"{url}/v1/instances").json()["data"]
    (pid,) = (each["pid"] for each in instances if each["model"] == "fake/story")
    os.kill(pid, signal.SIGKILL)
    status(page, "Answer finished")
    expect(page.locator(".markdown")).to_have_text(STORY)
    (after,) = (each for each in httpx.get(f"{url}/v1/instances").json()["data"] if each["model"] == "fake/story")
    assert (after["deaths"], after["pid"] == pid) == (1, False)


def test_markdown_is_shown_as_elements(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    ask(page, "fake/markdown")
    status(page, "Answer finished")
    answer = page.locator(".markdown")
    expect(answer.locator("h1")).to_have_text("Title")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("li")).to_have_text(["one", "two"])
    expect(answer.locator("pre code")).to_have_text('print("hello")\n')
    expect(answer.locator("td")).to_have_text(["1", "2"])


def test_reasoning_is_folded_and_not_sent_back(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    ask(page, "fake/thinks", "2+2")
    status(page, "Answer finished")
    expect(page.locator(".markdown")).to_have_text("The answer is 4.")
    reasoning = page.get_by_text("hmm, a sum")
    expect(reasoning).to_be_hidden()
    page.get_by_text("Reasoning").click()
    expect(reasoning).to_be_visible()
    with page.expect_request("**/v1/chat/completions") as second:
        ask(page, "fake/quick")
    assert "hmm" not in json.dumps(sent(second.value))


def test_what_a_hostile_model_writes_is_only_shown(url: str, visitor: Visitor) -> None:
    page = visitor.open(url)
    ask(page, "fake/hostile")
    status(page, "Answer finished")
    answer = page.locator(".markdown")
    expect(answer).to_contain_text("After.")
    assert page.evaluate("window.hacked") is None
    assert answer.locator("script, img, svg, iframe, style, form, input, [onclick], [style], [id]").count() == 0
    expect(answer).to_contain_text("<script>window.hacked = 1</script>")
    expect(answer).to_contain_text("[image: pixel] (https://evil.example/pixel.png)")
    expect(answer).to_contain_text("access [U+202E]evil[U+202C] granted")
    links = answer.locator("a").evaluate_all("all => all.map(a => [a.getAttribute('href'), a.rel, a.target])")
    safe = ["noopener noreferrer", "_blank"]
    assert [each for each in links if each[0] is not None] == [
        ["https://example.org/path", *safe],
        ["https://example.org/auto", *safe],
    ]
    answer.get_by_text("dead").click()
    assert page.evaluate("window.hacked") is None
    assert page.url.rstrip("/") == url


@pytest.mark.parametrize(
    "text",
    [
        "x" * 300_000,
        "[" * 50_000,
        "*_" * 30_000,
        "> " * 5_000,
        "- a\n" * 5_000,
        "`" * 50_001,
        "<" * 50_000,
        "|a" * 20_000,
    ],
    ids=lambda text: text[:3],
)
def test_text_that_is_hard_to_parse_is_shown(url: str, visitor: Visitor, text: str) -> None:
    page = visitor.open(url)
    script = page.locator("script[type=module]").get_attribute("src")
    assert script is not None
    length = page.evaluate(
        """async ([folder, text]) => {
            const { MarkdownText } = await import(folder);
            const shown = new MarkdownText();
            shown.add(text);
            shown.show();
            document.querySelector(".log").append(shown.element);
            return shown.element.textContent.length;
        }""",
        [f"/{script.replace('app.js', 'markdown.js')}", text],
    )
    assert length > 1000
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_refusal_is_told(url: str, visitor: Visitor) -> None:
    visitor.expected = ("status of 503",)
    page = visitor.open(url)
    ask(page, "fake/broken")
    expect(page.get_by_role("alert")).to_contain_text("the file is damaged")
    status(page, "Answer failed")


def test_a_key_is_asked_for_until_it_is_right(tmp_path: Path, visitor: Visitor) -> None:
    visitor.expected = ("status of 401",)
    card = fake_card("fake/quick", chat_template=CHAT_TEMPLATE, eos_after=20)
    with serve(tmp_path, card, access=Access(keys=(ApiKey("alice", "right-key"),))) as url:
        page = visitor.open(url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("This server asks for an API key.")
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
        page.keyboard.type("wrong-key")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The server does not accept this key.")
        page.keyboard.type("right-key")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        ask(page, "fake/quick")
        status(page, "Answer finished")
        page.reload()  # the tab still knows the key
        expect(page.get_by_label("Model", exact=True)).to_have_value("fake/quick")
        expect(dialog).to_be_hidden()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        other = visitor.open(url)
        expect(other.get_by_role("dialog")).to_be_visible()
        other.keyboard.press("Escape")
        expect(other.get_by_role("dialog")).to_be_hidden()
        expect(other.get_by_role("status")).to_contain_text("an API key is needed")


def test_without_javascript_the_page_says_where_the_api_is(url: str, visitor: Visitor) -> None:
    page = visitor.open(url, javascript=False)
    expect(page.locator("main")).to_contain_text("The API does not: it is at /v1 on this address")
    assert page.get_by_role("link", name="/docs").get_attribute("href") == "docs"


def test_pictures_are_for_models_that_see_them(visitor: Visitor, tmp_path: Path) -> None:
    sees = fake_card("fake/sees", chat_template=CHAT_TEMPLATE, mmproj="mmproj.gguf", answer="a cat")
    blind = fake_card("fake/blind", chat_template=CHAT_TEMPLATE)
    asked: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/v1/chat/completions"):
            asked.append(json.loads(request.post_data or ""))

    with serve(tmp_path, sees, blind) as url:
        page = visitor.open(url)
        page.on("request", note)
        chosen, pictures = page.get_by_label("Model", exact=True), page.get_by_label("Pictures")
        chosen.select_option("fake/blind")
        expect(pictures).to_be_hidden()
        chosen.select_option("fake/sees")
        file = {"name": "cat.png", "mimeType": "image/png", "buffer": random_png(1)}
        pictures.set_input_files(files=[file])  # pyright: ignore[reportArgumentType]
        page.get_by_label("Message", exact=True).fill("what is it?")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("article", name="Question")).to_contain_text("Picture: cat.png")
        expect(page.get_by_role("article", name="Answer")).to_contain_text("a cat")
    picture, text = asked[0]["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "what is it?"}
