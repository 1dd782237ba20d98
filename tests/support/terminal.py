"""An ``exo`` command, or another program, in a terminal of its own, as its user sees it."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.program import DEADLINE_SECONDS
from tests.support.server import environment

PROMPT = ">>> "
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]|[\x01\x02\x07]")


class Terminal:
    """Keeps the output without colours and cursor movements."""

    def __init__(
        self, home: Path, *arguments: str, program: tuple[str, ...] = (sys.executable, "-m", "exo"), **variables: str
    ) -> None:
        self.shown = ""
        self._mark = 0
        self._raw = b""
        self.master, inner = pty.openpty()
        termios.tcsetwinsize(inner, (30, 200))
        self.process = subprocess.Popen(
            [*program, *arguments],
            env={**environment(home), "TERM": "xterm", **variables},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(inner)

    def wait_for(self, pattern: str) -> str:
        """The output since the last wait, up to the first match."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not (match := re.compile(pattern).search(self.shown, self._mark)):
            if not self._read(end):
                raise AssertionError(f"{pattern!r} never came:\n{self.shown}")
        seen = self.shown[self._mark : match.end()]
        self._mark = match.end()
        return seen

    def keys(self, text: str) -> None:
        """Types. Input for a prompt must wait for the prompt: the terminal may drop what comes earlier."""
        os.write(self.master, text.encode())

    def say(self, text: str) -> str:
        """Types a line; returns the output until the next prompt."""
        self.keys(f"{text}\r")
        return self.wait_for(f"\n{PROMPT}")

    def end(self) -> int:
        """The exit status, once all output has come."""
        end = time.monotonic() + DEADLINE_SECONDS
        while self._read(end):
            pass
        return self.process.wait(max(0.0, end - time.monotonic()))

    def _read(self, end: float) -> bool:
        """More of what is shown; nothing more comes after the command's end, or was waited for after ``end``."""
        if not select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # Linux, when the other side is gone
            return False
        self._raw += data
        self.shown = plain(self._raw.decode(errors="replace")).replace("\r", "")
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _take_terminal() -> None:
    """Makes the terminal the one that Ctrl-C is typed into, also where the tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def plain(text: str) -> str:
    """The text without colours and cursor movements."""
    return _ESCAPES.sub("", text)
