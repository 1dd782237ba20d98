"""``exo setup mlx-cuda``: MLX for the CUDA release that this machine's driver supports."""

from importlib.metadata import requires

from exo.setup.steps import SetupError, pip_command, run, step
from exo.worker.protocol.nvidia_driver import DriverError, driver

_MLX_BUILDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
"""Each brings the same library, so only one of them can be installed."""


def set_up_mlx_cuda() -> str:
    """Replaces MLX's build for the CPU by the one for this driver's CUDA. Returns what was done. Raises SetupError."""
    try:
        present = driver()
    except DriverError as error:
        raise SetupError(str(error)) from error
    if present is None or not present.capabilities:
        raise SetupError("there is no NVIDIA driver with a GPU on this machine; MLX computes on the CPU")
    extra = f"mlx-cuda{min(present.cuda[0], 13)}"
    packages = [each.partition(";")[0] for each in requires("exo") or () if f'extra == "{extra}"' in each]
    if not packages:
        raise SetupError(
            "driver {} supports CUDA {}.{}, and MLX needs 12 or newer".format(present.version, *present.cuda)
        )
    with step(f"installing {', '.join(packages)} (download of more than 1 GB)"):
        run([*pip_command(), "uninstall", "--yes", *_MLX_BUILDS])
        run([*pip_command(), "install", *packages])
    return f"MLX is installed for CUDA: exo[{extra}]"
