"""Draws pictures with matplotlib, which the extra ``plot`` installs."""

from importlib import import_module
from pathlib import Path
from typing import Any

from exo.exit_code import CommandError, ExitCode

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Checks before the work that ``file`` can be drawn. Raises CommandError."""
    if file.suffix.lower() not in _FORMATS:
        names = ", ".join(_FORMATS)
        raise CommandError(f"--plot: the file's name must end in {names} (got {str(file)!r})", ExitCode.USAGE)
    if not file.parent.is_dir():
        raise CommandError(f"--plot: there is no directory {str(file.parent)!r}", ExitCode.USAGE)
    new_figure((1, 1))


def new_figure(size: tuple[float, float]) -> Any:  # noqa: ANN401 -- matplotlib is optional and its types are incomplete
    """An empty figure; ``size`` is width and height in inches. Raises CommandError without matplotlib."""
    try:
        return import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    except ModuleNotFoundError as error:
        raise CommandError("--plot: matplotlib is not installed; install it: pip install 'exo[plot]'") from error


def save(figure: Any, file: Path, dots_per_inch: int) -> None:  # noqa: ANN401 -- see above
    """Writes the picture. Raises CommandError."""
    try:
        figure.savefig(file, dpi=dots_per_inch)
    except OSError as error:
        raise CommandError(f"--plot: {file} cannot be written: {error}") from error
