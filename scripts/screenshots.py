"""Makes docs/screenshots/: the page in Chromium, on a server with the demo model. ``make screenshots`` calls it."""

import subprocess
import sys
from pathlib import Path
from shutil import which

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "screenshots"
MODEL = "gemma-3-270m"
QUESTION = "What is the capital of France?"


def main() -> None:
    """Starts a server on a free port, and ends it."""
    chromium = which("chromium") or which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is not installed; Debian's package is called chromium")
    command = [sys.executable, "-m", "exo", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[4]
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1000, "height": 720})
            page.set_default_timeout(300_000)
            FOLDER.mkdir(exist_ok=True)
            chat(page, url)
        finally:
            server.terminate()


def chat(page: Page, url: str) -> None:
    page.goto(url)
    page.locator("#chat select").first.locator("option", has_text=MODEL).first.wait_for(state="attached")
    option = page.locator("#chat select").first.locator("option", has_text=MODEL).first.get_attribute("value")
    page.get_by_label("Model", exact=True).select_option(option)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("7")
    page.get_by_text("Settings").click()
    page.get_by_label("Message", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    page.get_by_text("Answer finished").wait_for()
    page.screenshot(path=FOLDER / "chat.png")


if __name__ == "__main__":
    main()
