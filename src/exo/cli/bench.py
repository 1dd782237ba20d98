"""``exo bench``."""

from pathlib import Path
from typing import Annotated

import typer

from exo.bench.options import BenchOptions
from exo.bench.plot import draw
from exo.bench.run import run_bench
from exo.bench.table import show
from exo.cli.console import err, out
from exo.config import Access
from exo.exit_code import CommandError
from exo.plot import check_plot


def bench(
    url: Annotated[str, typer.Argument(help="The address of an OpenAI-compatible server: http://127.0.0.1:52415.")],
    model: Annotated[str, typer.Option(help="The model to request.")],
    endpoint: Annotated[str | None, typer.Option(help="completions or chat. Default: completions.")] = None,
    workload: Annotated[
        str | None, typer.Option(help="random, shared-prefix, long-prompt or repeat. Default: random.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Requests in flight, one stage per number. Default: 1,4,16.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Instead: requests per second at random times, such as 0.5,1,2.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Requests of each stage. Default: twice the concurrency, at least 8.")
    ] = None,
    prompt_words: Annotated[int | None, typer.Option(help="Words of a prompt. Default: 40.")] = None,
    shared_words: Annotated[
        int | None, typer.Option(help="Words at the beginning that all prompts share. Default: 400.")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(help="Different such beginnings, which prompts have in turn. Default: 1.")
    ] = None,
    long_words: Annotated[int | None, typer.Option(help="Words of the long prompt. Default: 2000.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Tokens to generate per request. Default: 64.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: 0, which is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of prompts, arrivals and sampling. Default: 0.")] = None,
    goodput: Annotated[
        str | None, typer.Option(help="Objective in ms, such as ttft:1000,itl:100. Also: gap (the longest) and e2e.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Requests before each stage that are not counted. Default: 1.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Request exactly the tokens above, which OpenAI's own servers refuse.")
    ] = True,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Request token ids and count them.")] = False,
    extra: Annotated[str | None, typer.Option(help="Further fields of each request, as a JSON object.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds per stage. Default: 300.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Default: the first key of EXO_API_KEY.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw throughput and latency against load into this file: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure an OpenAI-compatible server: latency, throughput, goodput, errors."""
    given = {name: value for name, value in locals().items() if name not in ("rate", "goodput", "plot", "as_json")}
    keys = Access.load().keys if api_key is None else ()
    given["api_key"] = keys[0].key if keys else api_key
    options = BenchOptions.check(**given, rates=rate, objective=goodput)
    if plot is not None:
        check_plot(plot)
    with err.status("connecting") as status:
        report = run_bench(options, status.update)
    if as_json:
        out.print_json(report.model_dump_json())
    else:
        show(report, out)
    if plot is not None:
        draw({"": report}, plot)
    if not all(stage.requests.whole for stage in report.stages):
        raise CommandError("a stage has no complete reply")
