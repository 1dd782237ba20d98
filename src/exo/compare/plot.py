"""Draws the divergence of two engines over the position in the text."""

from pathlib import Path

from exo.compare.comparison import Comparison
from exo.plot import check_plot, new_figure, save


def draw(comparison: Comparison, file: Path) -> None:
    """Writes the largest and the mean difference of log-probabilities and the KL divergence at every position.

    Raises CommandError.
    """
    check_plot(file)
    figure = new_figure((9, 5))
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
    save(figure, file, 150)
