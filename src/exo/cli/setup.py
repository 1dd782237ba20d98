"""``exo setup``: installs what an engine needs beyond exo's own packages."""

from typing import Annotated

import typer

from exo.cli.console import say
from exo.exit_code import CommandError, ExitCode
from exo.setup.cuda import set_up_cuda
from exo.setup.engines import set_up_mlx_cuda, set_up_vllm


def setup(
    engine: Annotated[str, typer.Argument(help="cuda: llama.cpp on NVIDIA GPUs; mlx-cuda; vllm.")],
    source: Annotated[str, typer.Option(help="Of cuda: auto, prebuilt, build, or 0 to remove it.")] = "auto",
    archs: Annotated[str, typer.Option(help="Of cuda: architectures to build for, such as 89-real;90-real.")] = "",
) -> None:
    """Set up an engine on this machine: llama.cpp's CUDA plug-in, MLX for CUDA, or vLLM."""
    match engine:
        case "cuda":
            say(set_up_cuda(source, archs))
        case "mlx-cuda":
            say(set_up_mlx_cuda())
        case "vllm":
            say(set_up_vllm())
        case _:
            raise CommandError(f"expected cuda, mlx-cuda or vllm (got {engine!r})", ExitCode.USAGE)
