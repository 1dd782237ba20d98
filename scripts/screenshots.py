"""Makes docs/screenshots/: the page in Chromium, on a server with the demo model. ``make screenshots`` calls it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import httpx
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "screenshots"
MODEL = "google/gemma-3-270m"
QUESTION, ANSWER_TOKENS = "What is the capital of France?", 7
CLIENTS = ("curl", "notebook", "agent")
WATCHED_SECONDS = 15
DEADLINE_MILLISECONDS = 300_000


def main() -> None:
    """Starts a server on a free port, and ends it."""
    chromium = which("chromium") or which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is not installed; Debian's package is called chromium")
    expect.set_options(timeout=DEADLINE_MILLISECONDS)
    command = [sys.executable, "-m", "exo", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[4]
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1000, "height": 720})
            page.set_default_timeout(DEADLINE_MILLISECONDS)
            FOLDER.mkdir(exist_ok=True)
            for view in (compare, chat, models, now):
                page.goto(f"{url}/#{view.__name__}")
                view(page)
        finally:
            server.terminate()


def compare(page: Page) -> None:
    for side, engine in (("left", "cuda"), ("right", "mlx")):
        page.get_by_label(f"Model {side}").select_option(MODEL)
        page.get_by_label(f"Engine {side}").select_option(engine)
    page.get_by_label("Most tokens of each").fill(str(ANSWER_TOKENS))
    page.get_by_label("Prompt").fill(QUESTION)
    for _ in range(2):  # the models load for the first answers
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator("#compare").get_by_role("button", name="Stop")).to_be_hidden()
        expect(page.get_by_text("Answer finished")).to_have_count(2)
    page.screenshot(path=FOLDER / "compare.png")


def chat(page: Page) -> None:
    page.get_by_label("Model", exact=True).select_option(MODEL)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens", exact=True).fill(str(ANSWER_TOKENS))
    page.get_by_text("Settings").click()
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator("#chat").get_by_text("Answer finished").wait_for()
    page.screenshot(path=FOLDER / "chat.png")


def models(page: Page) -> None:
    row = page.locator("details.model").filter(has=page.get_by_text(MODEL, exact=True))
    row.locator("summary").click()
    row.locator("dl").get_by_text("tokens").first.wait_for()
    row.scroll_into_view_if_needed()
    page.screenshot(path=FOLDER / "models.png")


def now(page: Page) -> None:
    server = page.url.partition("#")[0]

    def ask(client: str) -> None:
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "seed": 1}
        headers = {"user-agent": client, "x-request-id": client}
        httpx.post(f"{server}v1/completions", json=body, headers=headers, timeout=None)

    with ThreadPoolExecutor() as asking:
        for client in CLIENTS:
            asking.submit(ask, client)
        decoding = page.get_by_role("region", name="Requests").get_by_text("decode", exact=True)
        expect(decoding).to_have_count(len(CLIENTS))
        page.wait_for_timeout(1000 * WATCHED_SECONDS)
        page.screenshot(path=FOLDER / "now.png")
        for client in CLIENTS:
            httpx.post(f"{server}v1/cancel/{client}")


if __name__ == "__main__":
    main()
