"""Divergence over position, as a picture. Needs the extra ``plot``."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from exo.compare.comparison import CompareError, Comparison

FORMATS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Says before the work, not after it, that ``file`` cannot be drawn. Raises CompareError."""
    if file.suffix.lower() not in FORMATS:
        raise CompareError(f"plot: the file's name must end in {', '.join(FORMATS)} (got {str(file)!r})")
    if not file.parent.is_dir():
        raise CompareError(f"plot: there is no directory {str(file.parent)!r}")
    _matplotlib()


def draw(comparison: Comparison, file: Path) -> None:
    """Writes the largest and the mean difference of log-probabilities and the KL divergence at every position.

    Raises CompareError.
    """
    check_plot(file)
    figure = _matplotlib().Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for pair in comparison.pairs:
        label = f"{pair.other} against {pair.reference}"
        rows = pair.divergence.by_position
        positions = [row.position for row in rows]
        axes.plot(positions, [row.max_abs for row in rows], label=f"{label}: max |Δlogprob| over the vocabulary")
        axes.plot(positions, [row.mean_abs for row in rows], label=f"{label}: mean |Δlogprob|")
        axes.plot(positions, [row.kl for row in rows], label=f"{label}: KL({pair.reference} || {pair.other})")
    if any(row.max_abs > 0 for pair in comparison.pairs for row in pair.divergence.by_position):
        axes.set_yscale("log")
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("nats")
    axes.set_title(
        f"{comparison.model_id}, {', '.join(f'{each.engine} {each.version}' for each in comparison.engines)}"
    )
    axes.legend(fontsize="small")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise CompareError(f"plot: {file} cannot be written: {error}") from error


def _matplotlib() -> ModuleType:
    try:
        return import_module("matplotlib.figure")  # by name, since it is optional and its types are incomplete
    except ModuleNotFoundError as error:
        raise CompareError("plot: matplotlib is not installed; to mend it: pip install 'exo[plot]'") from error
