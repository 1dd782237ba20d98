"""``exo convert``."""

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from exo.cli.console import err, say, warn
from exo.convert import Bits, ConversionProgress, ConvertError, Dtype, Format
from exo.convert import convert as convert_model
from exo.exit_code import CommandError


def convert(
    source: Annotated[Path, typer.Argument(help="A GGUF file, or a folder with safetensors.")],
    target: Annotated[Path, typer.Argument(help="The folder or the .gguf file to write.")],
    dtype: Annotated[str, typer.Option(help="f32, f16 or bf16; for GGUF also q8_0.")] = "bf16",
    quant: Annotated[int | None, typer.Option(help="Bits of MLX's own quantisation, 4 or 8.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.")] = False,
) -> None:
    """Convert a model between llama.cpp's GGUF and the safetensors that MLX loads."""
    to: Format = "gguf" if target.suffix == ".gguf" else "mlx"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("reading", total=None)

        def show(progress: ConversionProgress) -> None:
            bar.update(task, description=progress.tensor, completed=progress.done_bytes, total=progress.total_bytes)

        try:
            report = convert_model(
                source,
                target,
                to=to,
                dtype=cast(Dtype, dtype),  # other values are refused by name
                bits=cast(Bits | None, quant),
                overwrite=overwrite,
                on_progress=show,
            )
        except (ConvertError, OSError) as error:
            raise CommandError(str(error)) from error
    size = f"{report.bytes_written / 1e9:.2f} GB"
    say(f"{report.target}: {report.architecture}, {report.tensors} tensors, {size}")
    if report.left_out:
        warn(f"left out, changing no result: {', '.join(report.left_out)}")
