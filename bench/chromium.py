"""Chromium as a user has it, without a debugger while it is measured, and the CPU time of its processes."""

import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--window-size=1280,800",
)
_DEADLINE_SECONDS = 120.0


@contextmanager
def chromium(command: str, urls: Sequence[str], *, windows: bool, title: str) -> Generator[psutil.Process]:
    """Shows each of ``urls`` until its page has the title: all in windows of their own, or the last tab in front.

    A debugger opens the pages and leaves before the context begins, since it takes part in each event of the network.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [command, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            browser = psutil.Process(process.pid)
            try:
                _open(Path(profile), urls, windows=windows, title=title)
                yield browser
            finally:
                for each in (*browser.children(recursive=True), browser):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()


def _open(profile: Path, urls: Sequence[str], *, windows: bool, title: str) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    port = profile / "DevToolsActivePort"
    while not (port.exists() and port.read_text().count("\n")):
        assert time.monotonic() < deadline, "Chromium does not start"
        time.sleep(0.1)
    with sync_playwright() as playwright:
        debugged = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port.read_text().split()[0]}")
        session: Any = debugged.new_browser_cdp_session()
        for url in urls:
            session.send("Target.createTarget", {"url": url, "newWindow": windows})
        while _titles(session).count(title) < len(urls):
            assert time.monotonic() < deadline, _titles(session)
            time.sleep(0.1)
        debugged.close()


def _titles(session: Any) -> list[str]:  # noqa: ANN401 -- Playwright's type is incomplete
    return [each["title"] for each in session.send("Target.getTargets")["targetInfos"] if each["type"] == "page"]


def cpu_seconds(browser: psutil.Process) -> dict[str, float]:
    """The CPU time of Chromium so far, by the type of the process: browser, renderer, gpu-process, utility, zygote."""
    found = defaultdict[str, float](float)
    for process in (browser, *browser.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            used, command = process.cpu_times(), process.cmdline()
            kinds = [part.removeprefix("--type=") for part in " ".join(command).split() if part.startswith("--type=")]
            found[kinds[0] if kinds else "browser"] += used.user + used.system
    return found
