"""The steps that the set-up of each of ggml's GPU plug-ins shares: links in the environment, a self-test on the GPU."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exo.setup.steps import SetupError
from exo.worker.runner_cuda.loading.devices import CUDA, GPU_BACKENDS, VULKAN
from exo.worker.runner_cuda.plugin import BASE, DESCRIPTION

__all__ = ["CUDA", "GPU_BACKENDS", "VULKAN", "SelfTest", "link_plugin", "self_test"]
SELF_TEST_SECONDS = 300
"""A driver may compile all kernels of a plug-in at its first use."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Outcome of the self-test. ``proofs`` are the fields of ``runner_cuda.self_test.Proof``, one for each device."""

    proofs: tuple[dict[str, Any], ...]
    failure: str
    """Why the GPUs cannot be relied on; empty if each has computed what the CPU has."""
    broken: bool
    """Whether the plug-in is at fault. It is not if there is no device."""

    @property
    def proved(self) -> str:
        """A sentence that names the GPUs and the time that each has taken."""
        times = ", ".join(f"{each['device']} in {each['seconds']:.1f} s" for each in self.proofs)
        return f"the same results as on the CPU: {times}"


def link_plugin(folder: Path, library: str, target: Path) -> None:
    """Makes ``target`` lead to the plug-in in ``folder`` and to this environment's ggml. Raises SetupError."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SetupError("llama-cpp-python is not installed in this environment; exo setup llama installs it")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / library).symlink_to(folder / library)
    # The process's only libggml-base, by the name that the plug-in links to.
    (target / BASE).symlink_to(Path(spec.origin).parent / "lib" / f"{BASE}.0")
    shutil.copy(folder / DESCRIPTION, target / DESCRIPTION)


def self_test(backend: str) -> SelfTest:
    """Has a process of its own compute on each GPU of a card backend, see ``runner_cuda.self_test``."""
    command = [sys.executable, "-m", "exo.worker.runner_cuda", "--self-test", backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SELF_TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return SelfTest((), f"the self-test did not end within {SELF_TEST_SECONDS} s", broken=True)
    if done.returncode:
        last = (done.stderr.strip() or "nothing on standard error").splitlines()[-1][:500]
        return SelfTest((), f"the self-test ended with status {done.returncode}: {last}", broken=True)
    proofs = tuple(json.loads(done.stdout))
    failures = [f"{each['device']}: {each['failure']}" for each in proofs if each["failure"]]
    missing = f"{GPU_BACKENDS[backend]} sees no device here"
    return SelfTest(proofs, "; ".join(failures) if proofs else missing, bool(failures))
