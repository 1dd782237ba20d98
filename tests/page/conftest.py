"""Chromium, and pages in it that say nothing on their console and ask nothing of another host."""

import shutil
from collections.abc import Generator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEADLINE_MILLISECONDS = 120_000
"""How long a test waits for what must come; reached only if something is broken."""


class Visitor:
    """Opens pages and notes what they must not do."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._closing = ExitStack()
        self.complaints: list[str] = []
        self.expected: tuple[str, ...] = ()
        """Parts of complaints that a test causes, such as the status of a refused request."""

    def open(self, url: str, *, width: int = 900, dark: bool = False, javascript: bool = True) -> Page:
        opened = self._browser.new_context(
            viewport={"width": width, "height": 700},
            color_scheme="dark" if dark else "light",
            java_script_enabled=javascript,
        )
        self._closing.callback(opened.close)
        opened.set_default_timeout(DEADLINE_MILLISECONDS)
        page = opened.new_page()
        host = urlsplit(url).netloc

        def said(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                self.complaints.append(f"console: {message.text}")

        def asked(request: Request) -> None:
            if urlsplit(request.url).netloc != host:
                self.complaints.append(f"a request for {request.url}")

        page.on("console", said)
        page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        page.on("request", asked)
        page.goto(url)
        return page

    def leave(self) -> list[str]:
        """Closes the pages. Returns the complaints that nobody expected."""
        self._closing.close()
        return [each for each in self.complaints if not any(part in each for part in self.expected)]


@pytest.fixture(scope="package")
def browser() -> Generator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; Debian's package is called chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser: Browser) -> Generator[Visitor]:
    visitor = Visitor(browser)
    yield visitor
    assert visitor.leave() == []
