"""The commands ``exo bench`` and ``python -m exo.bench``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from exo.exit_code import CommandError, ExitCode

if TYPE_CHECKING:
    from pydantic import JsonValue

    from exo.bench.options import Options

_NOT_PASSED_ON = {"concurrency", "rate", "goodput", "extra", "api_key", "plot", "as_json"}
"""Options of the command that ``Options`` has in another form or not at all."""


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
    given = {name: value for name, value in locals().items() if name not in _NOT_PASSED_ON}
    from exo.bench.options import Objective, Options

    err = Console(stderr=True)
    try:
        options = Options.check(
            **given,
            concurrency=_numbers("--concurrency", concurrency),
            rates=_numbers("--rate", rate),
            objective=Objective.parse(goodput) if goodput is not None else None,
            extra=_object("--extra", extra),
            api_key=api_key if api_key is not None else _servers_key(),
        )
        _run(options, plot, as_json, err)
    except CommandError as error:
        err.print(f"exo: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.code) from None


def _run(options: "Options", plot: Path | None, as_json: bool, err: Console) -> None:
    from exo.bench.plot import draw
    from exo.bench.run import run_bench
    from exo.bench.table import show
    from exo.plot import check_plot

    if plot is not None:
        check_plot(plot)
    with err.status("connecting") as status:
        report = run_bench(options, status.update)
    out = Console()
    if as_json:
        out.print_json(report.model_dump_json())
    else:
        show(report, out)
    if plot is not None:
        draw({"": report}, plot)
    if not all(stage.requests.whole for stage in report.stages):
        raise CommandError("a stage has no complete reply")


def _servers_key() -> str | None:
    """The first key of a server with this environment. Raises CommandError."""
    from exo.config import Access

    keys = Access.load().keys
    return keys[0].key if keys else None


def _numbers(option: str, text: str | None) -> list[float] | None:
    """Parses a list such as ``1,4,16``. Raises CommandError."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        message = f"{option}: must be numbers separated by commas (got {text!r})"
        raise CommandError(message, ExitCode.USAGE) from None


def _object(option: str, text: str | None) -> "dict[str, JsonValue] | None":
    """Parses a JSON object. Raises CommandError."""
    from pydantic import JsonValue, TypeAdapter, ValidationError

    if text is None:
        return None
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json(text)
    except ValidationError:
        raise CommandError(f"{option}: must be a JSON object (got {text!r})", ExitCode.USAGE) from None
