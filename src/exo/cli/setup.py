"""``exo setup``: installs what an engine needs beyond exo's own packages."""

from typing import Annotated

import typer

from exo.cli.console import say
from exo.exit_code import CommandError, ExitCode
from exo.setup.cuda import set_up_cuda
from exo.setup.demo import set_up_demo
from exo.setup.llama import set_up_llama
from exo.setup.mlx import set_up_mlx_cuda
from exo.setup.vllm import set_up_vllm
from exo.setup.vulkan import set_up_vulkan

_PARTS = """llama: llama.cpp, compiled for this processor; cuda: its plug-in for NVIDIA GPUs; vulkan: its
plug-in for other GPUs; mlx-cuda; vllm; demo: the demo model."""
_SOURCE = "Of cuda: auto, prebuilt, build, or 0 to remove it. Of vulkan: 0 removes it. Of vllm: 0 is for the CPU."


def setup(
    part: Annotated[str, typer.Argument(help=_PARTS)],
    source: Annotated[str, typer.Option(help=_SOURCE)] = "auto",
    archs: Annotated[str, typer.Option(help="Of cuda: architectures to build for, such as 89-real;90-real.")] = "",
) -> None:
    """Set up an engine on this machine, or the demo model."""
    match part:
        case "llama":
            say(set_up_llama())
        case "cuda":
            say(set_up_cuda(source, archs))
        case "vulkan":
            say(set_up_vulkan(source))
        case "mlx-cuda":
            say(set_up_mlx_cuda())
        case "vllm":
            say(set_up_vllm(on_cpu=source == "0"))
        case "demo":
            say(set_up_demo())
        case _:
            raise CommandError(f"expected llama, cuda, vulkan, mlx-cuda, vllm or demo (got {part!r})", ExitCode.USAGE)
