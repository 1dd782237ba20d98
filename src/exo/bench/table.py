"""Prints a report as a table with one column per load."""

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from exo.bench.report import Distribution, Report, Stage


def show(report: Report, console: Console) -> None:
    options = report.options
    sampling = "greedy" if options.temperature == 0 else f"temperature {options.temperature:g}"
    for name, value in (("top_k", options.top_k), ("top_p", options.top_p)):
        sampling += f", {name} {value:g}" if value is not None else ""
    words = f"{options.prompt_words} words"
    if options.workload == "shared-prefix":
        words = f"{options.shared_words} shared words and {words}"
        words += f" in {options.sessions} sessions" if options.sessions > 1 else ""
    if options.workload == "long-prompt":
        words = f"{options.long_words} words among streams of {words}"
    console.print(
        Text(
            f"{options.model} at {options.url}, {options.endpoint}; prompts: {options.workload}, {words}; "
            f"{options.output_tokens} tokens of output, {sampling}; seed {options.seed}"
        ),
        soft_wrap=True,
    )
    table = Table("", *(_load(stage) for stage in report.stages), box=None)
    for name, cell in _rows(report):
        table.add_row(Text(name), *(Text(cell(stage)) for stage in report.stages))
    console.print(table)
    for stage in report.stages:
        for kind, message in stage.requests.messages.items():
            console.print(Text(f"{_load(stage)}: {kind}: {' '.join(message.split())}"), soft_wrap=True)


def _load(stage: Stage) -> str:
    if stage.load.rate is not None:
        return f"{stage.load.rate:g} requests/s"
    streams = stage.load.concurrency
    return f"{streams} stream" if streams == 1 else f"{streams} streams"


Cell = Callable[[Stage], str]


def _rows(report: Report) -> Iterator[tuple[str, Cell]]:
    yield "requests", _requests
    yield "tokens, prompt (cached)", lambda stage: f"{stage.tokens.prompt} ({_number(stage.tokens.cached)})"
    yield "tokens, output", _output
    if report.options.workload != "long-prompt":
        yield "output tokens/s", lambda stage: f"{stage.output_tokens_per_second:.1f}"
        yield "total tokens/s", lambda stage: f"{stage.total_tokens_per_second:.1f}"
        yield "requests/s", lambda stage: f"{stage.requests_per_second:.2f}"
        if report.options.objective is not None:
            yield f"goodput, {report.options.objective} ms", _goodput
        yield "ms, p50 / p90 / p95 / p99", lambda _: ""
        yield "  time to first token", lambda stage: _percentiles(stage.ttft)
        yield "  inter-token latency", lambda stage: _percentiles(stage.itl)
        yield "  time per output token", lambda stage: _percentiles(stage.tpot)
        yield "  end to end", lambda stage: _percentiles(stage.e2e)
        return
    yield "long prompt, tokens", lambda stage: _number(stage.long_prompt and stage.long_prompt.prompt_tokens)
    yield (
        "long prompt, ms to first token",
        lambda stage: f"{stage.long_prompt.ttft_ms:.0f}" if stage.long_prompt else "-",
    )
    yield "the others' inter-token latency, ms, p50 / p90 / p95 / p99", lambda _: ""
    yield "  before", lambda stage: _percentiles(stage.long_prompt and stage.long_prompt.gaps_before)
    yield "  until its first token", lambda stage: _percentiles(stage.long_prompt and stage.long_prompt.gaps_during)
    yield "the others' chunks/s, before and until", _chunk_rates


def _requests(stage: Stage) -> str:
    of = stage.requests
    errors = "".join(f", {count} {kind}" for kind, count in of.errors.items())
    return f"{of.whole} of {of.sent}" + (f", {of.cut} cut" if of.cut else "") + errors


def _output(stage: Stage) -> str:
    tokens, whole = stage.tokens, stage.requests.whole
    if tokens.checked_by_ids == whole:
        return f"{tokens.output}, every id seen"
    return str(tokens.output) if tokens.counted_by_usage == whole else f"{tokens.output}, by chunks"


def _goodput(stage: Stage) -> str:
    good = stage.goodput
    return f"{good.requests_per_second:.2f} requests/s ({good.share:.0%})" if good is not None else "-"


def _percentiles(of: Distribution | None) -> str:
    return "-" if of is None else " / ".join(_short(each) for each in (of.p50, of.p90, of.p95, of.p99))


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _chunk_rates(stage: Stage) -> str:
    found = stage.long_prompt
    if found is None:
        return "-"
    return f"{found.stream_chunks_per_second_before:.1f}, {found.stream_chunks_per_second_during:.1f}"
