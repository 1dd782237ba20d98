"""Other hosts for tests: command prefixes that run a program on this machine with another home, without root."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.program import DEADLINE_SECONDS

_MARK = "EXO_TEST_HOST"


class FakeHost:
    """Its programs are the processes with its mark in their environment, which their children inherit."""

    def __init__(self, folder: Path, name: str, *variables: str) -> None:
        self.name = name
        self.home = folder / name
        self.home.mkdir()
        self.run = ["env", f"EXO_HOME={self.home}", f"{_MARK}={self.home}", *variables]

    def processes(self) -> Iterator[psutil.Process]:
        """Those that have not ended; stopped ones have not."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def runners(self) -> list[psutil.Process]:
        """Runners of models, without probes, guards and children."""
        found: list[psutil.Process] = []
        for each in self.processes():
            with suppress(psutil.Error):
                if any(word.startswith("label=") for word in each.cmdline()[:6]):
                    found.append(each)
        return found

    def signal(self, number: signal.Signals) -> None:
        """Signals everything there."""
        for each in [*self.processes()]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(number)


def write_hosts(home: Path, *hosts: FakeHost) -> None:
    """Writes the file of hosts of a server."""
    home.mkdir(parents=True, exist_ok=True)
    lines = [f"[{each.name}]\nrun = {json.dumps(each.run)}\n" for each in hosts]
    (home / "hosts.toml").write_text("\n".join(lines))


def wait_until(condition: Callable[[], bool]) -> None:
    """Asks every few milliseconds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)
