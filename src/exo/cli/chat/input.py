"""The input of ``exo chat``: a line editor with a history, and messages of several lines."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import final

_QUOTES = '"""'
_KEPT_LINES = 1000


@final
class ChatInput:
    """Reads messages from standard input. ``history`` is the file that keeps lines from one chat to the next.

    A line that ends with a backslash continues on the next one. Three quotation marks at the beginning, or behind a
    command, begin a message that ends with the next three.
    """

    def __init__(self, history: Path | None) -> None:
        self._at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._history = history if self._at_terminal else None
        if self._at_terminal:
            import readline

            readline.set_auto_history(False)
            readline.set_history_length(_KEPT_LINES)
        if self._history is not None:
            _open_history(self._history)

    def read(self) -> str:
        """The next message, as typed. Raises EOFError at the end of the input and KeyboardInterrupt for Ctrl-C."""
        line = self._line(">>> ")
        head, quotes, rest = line.partition(_QUOTES)
        if quotes and (not head.strip() or head.startswith("/")):
            while _QUOTES not in rest:
                rest += "\n" + self._line("... ")
            inside, _, after = rest.partition(_QUOTES)
            return head + inside + after
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._line("... ")
        return line

    def _line(self, prompt: str) -> str:
        line = input(prompt if self._at_terminal else "").encode(errors="replace").decode()
        if self._at_terminal and line.strip():
            self._keep(line)
        return line

    def _keep(self, line: str) -> None:
        import readline

        readline.add_history(line)
        if self._history is not None:
            with suppress(OSError):  # a full disk must not end a chat
                readline.append_history_file(1, self._history)


def _open_history(path: Path) -> None:
    """Reads the history, or creates it for its owner alone. A failure does not stop the chat."""
    import readline

    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
        readline.read_history_file(path)
        if readline.get_current_history_length() >= _KEPT_LINES:
            readline.write_history_file(path)
