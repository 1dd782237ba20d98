"""The terminal: standard output and standard error."""

from rich.console import Console

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line on standard output, unchanged."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints a line on standard error."""
    err.print(f"exo: {text}", markup=False, highlight=False, soft_wrap=True)
