"""Draws throughput and latency against load."""

from collections.abc import Mapping
from pathlib import Path

from exo.bench.report import Report
from exo.plot import check_plot, new_figure, save


def draw(reports: Mapping[str, Report], file: Path) -> None:
    """Writes output rate, time to first token and inter-token latency of each server, by name. Raises CommandError."""
    check_plot(file)
    figure = new_figure((11, 3.6))
    rate, first, between = figure.subplots(1, 3)
    for name, report in reports.items():
        label = f"{name} " if name else ""
        loads = [stage.load.rate or stage.load.concurrency for stage in report.stages]
        rates = [stage.output_tokens_per_second for stage in report.stages]
        (line,) = rate.plot(loads, rates, marker="o", label=name or report.options.model)
        ttft, itl = ([getattr(stage, name) for stage in report.stages] for name in ("ttft", "itl"))
        for axes, found in ((first, ttft), (between, itl)):
            for percentile, style in (("p50", "-"), ("p99", ":")):
                values = [getattr(each, percentile) if each else None for each in found]
                axes.plot(loads, values, style, marker=".", color=line.get_color(), label=f"{label}{percentile}")
    open_loop = any(stage.load.rate is not None for report in reports.values() for stage in report.stages)
    for axes, title in ((rate, "output tokens/s"), (first, "time to first token, ms"), (between, "inter-token, ms")):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("requests/s" if open_loop else "streams")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    save(figure, file, 90)
