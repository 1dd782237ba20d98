"""``exo setup``: installs what an engine needs beyond exo's own packages."""

from typing import Annotated

import typer

from exo.cli.console import say
from exo.exit_code import CommandError, ExitCode
from exo.setup.cuda import set_up_cuda


def setup(
    engine: Annotated[str, typer.Argument(help="cuda: llama.cpp on NVIDIA GPUs.")],
    source: Annotated[str, typer.Option(help="auto, prebuilt, build, or 0 to remove it.")] = "auto",
    archs: Annotated[str, typer.Option(help="The architectures to build for, such as 89-real;90-real.")] = "",
) -> None:
    """Set up an engine on this machine: for cuda, llama.cpp's CUDA plug-in."""
    if engine != "cuda":
        raise CommandError(f"there is no setup of {engine!r}; there is one of cuda", ExitCode.USAGE)
    say(set_up_cuda(source, archs))
