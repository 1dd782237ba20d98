"""The commands about engines: route, doctor, convert, compare."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from exo.cli.common import (
    AsJson,
    Card,
    Model,
    ModelsDir,
    card_from,
    catalogue_from,
    err,
    fail,
    out,
    say,
    settings_from,
    warn,
)
from exo.exit_code import ExitCode


def route(model: Model, models_dir: ModelsDir = None, as_json: AsJson = False) -> None:
    """Say which runner would serve a model here, and why, without running anything."""
    import anyio

    from exo.api.admin.speeds import SpeedAtLoad, known_speeds
    from exo.worker.router import Refusal, model_not_found, parse_model
    from exo.worker.router import route as decide
    from exo.worker.supervisor.host_probe import probe_host
    from exo.worker.supervisor.speed_store import SpeedStore

    settings = settings_from(models_dir=models_dir)
    catalogue = catalogue_from(settings)
    speeds, known = SpeedStore(settings.speeds_file), list[SpeedAtLoad]()
    wish = parse_model(model)
    card = catalogue.get(wish.name)
    if card is None:
        decision = model_not_found(wish.name, catalogue.suggest(wish.name))
    else:
        host = anyio.run(probe_host)
        speeds.know(host)
        known = known_speeds(speeds, card)
        preference = speeds.preference(card, card.prefer or settings.prefer, load=1, now=time.time())
        decision = decide(wish.runner, card, host, (), card.needs, preference=preference)
    if isinstance(decision, Refusal):
        code = ExitCode.NOT_FOUND if decision.code == "model_not_found" else ExitCode.FAILED
        if as_json:
            out.print_json(json.dumps({"code": decision.code, "message": decision.message, "param": decision.param}))
            raise typer.Exit(code)
        fail(decision.message, code)
    if as_json:
        told = {"runner": decision.runner, "backend": decision.backend, "reason": decision.reason}
        out.print_json(json.dumps({**told, "speeds": [each.model_dump() for each in known]}))
        return
    say(f"{model} -> runner {decision.runner}, backend {decision.backend}")
    say(decision.reason)
    for each in known:
        say(f"  {each}")


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, which engines work on it, and the command that mends what does not."""
    import anyio

    from exo.cli.doctor import as_json as to_json
    from exo.cli.doctor import as_text, healthy
    from exo.worker.supervisor.host_probe import TRY_SECONDS, probe_commands, probe_host

    host = anyio.run(probe_host, probe_commands(thorough=True), TRY_SECONDS)
    if as_json:
        out.print_json(json.dumps(to_json(host)))
    else:
        for line in as_text(host):
            say(line)
    raise typer.Exit(ExitCode.OK if healthy(host) else ExitCode.FAILED)


def convert(
    source: Annotated[Path, typer.Argument(help="A GGUF file, or a folder with safetensors.")],
    target: Annotated[Path, typer.Argument(help="The folder, or the .gguf file, to write.")],
    dtype: Annotated[str, typer.Option(help="f32, f16 or bf16; for a GGUF also q8_0.")] = "bf16",
    quant: Annotated[int | None, typer.Option(help="Bits of MLX's own quantisation, 4 or 8.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that exists.")] = False,
) -> None:
    """Convert a model between llama.cpp's GGUF and the safetensors that MLX loads."""
    from typing import cast

    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from exo.convert import Bits, ConversionProgress, ConvertError, Dtype, Format
    from exo.convert import convert as carry_over

    to: Format = "gguf" if target.suffix == ".gguf" else "mlx"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=err) as bar:
        task = bar.add_task("reading", total=None)

        def show(progress: ConversionProgress) -> None:
            bar.update(task, description=progress.tensor, completed=progress.done_bytes, total=progress.total_bytes)

        try:
            # What is not one of these values is refused by name.
            report = carry_over(
                source,
                target,
                to=to,
                dtype=cast(Dtype, dtype),
                bits=cast(Bits | None, quant),
                overwrite=overwrite,
                on_progress=show,
            )
        except (ConvertError, OSError) as error:
            bar.stop()
            fail(str(error))
    size = f"{report.bytes_written / 1e9:.2f} GB"
    say(f"{report.target}: {report.architecture}, {report.tensors} tensors, {size}")
    if report.left_out:
        warn(f"left out, changing no result: {', '.join(report.left_out)}")


def compare(
    model: Card,
    engines: Annotated[
        str | None, typer.Option(help="Runners, such as cuda,mlx; by default all of the card's.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first prompt's sampled text.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw divergence over position into this file.")] = None,
    models_dir: ModelsDir = None,
    as_json: AsJson = False,
) -> None:
    """Show on real numbers how far two engines agree on one model."""
    from exo.compare.comparison import CompareError
    from exo.compare.plot import check_plot, draw
    from exo.compare.prompts import PROMPTS, read_prompts
    from exo.compare.run import Options
    from exo.compare.run import compare as run_comparison
    from exo.compare.table import show

    settings = settings_from(models_dir=models_dir)
    catalogue = catalogue_from(settings)
    card = card_from(catalogue, model)
    try:
        if plot is not None:
            check_plot(plot)
        options = Options(read_prompts(prompts) if prompts else PROMPTS, tokens, seed)
        with err.status("comparing") as status:
            names = engines.split(",") if engines else None
            comparison = run_comparison(settings, catalogue, card.model_id, names, options, status.update)
        if plot is not None:
            draw(comparison, plot)
    except CompareError as error:
        fail(str(error))
    if as_json:
        out.print_json(comparison.model_dump_json())
    else:
        show(comparison, out)
