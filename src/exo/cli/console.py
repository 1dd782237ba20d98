"""The terminal: standard output and standard error."""

import os
import sys

from rich.console import Console

_PIPE_WIDTH = 10_000
"""Columns where no terminal limits them, so that a table in a pipe has one line for each row."""


def _width() -> int | None:
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return None if is_terminal or "COLUMNS" in os.environ else _PIPE_WIDTH


out = Console(width=_width())
err = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line on standard output, unchanged."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints a line on standard error."""
    err.print(f"exo: {text}", markup=False, highlight=False, soft_wrap=True)
