"""The llama.cpp runner's command, and the backends that it serves on this machine."""

import os
import sys

from anyio import fail_after, run_process

from exo.shared.logging import logger
from exo.shared.types.backends import Backend
from exo.worker.protocol.probe import Probe

PROBE_SECONDS = 60.0


def runner_command() -> list[str]:
    """The command of the runner, in the environment of EXO_LLAMA_CPP_PYTHON or in this one."""
    return [os.environ.get("EXO_LLAMA_CPP_PYTHON") or sys.executable, "-m", "exo_llama_cpp"]


async def llama_cpp_backends() -> list[Backend]:
    """What the runner itself says. Nothing if llama.cpp is missing or does not load, which is no error on a Mac."""
    try:
        with fail_after(PROBE_SECONDS):
            done = await run_process([*runner_command(), "--probe"], check=False)
        found = Probe.model_validate_json(done.stdout).backends
    except (OSError, TimeoutError, ValueError) as error:
        logger.info(f"llama.cpp serves nothing here: {error}")
        return []
    return [each for each in Backend if each.value in found]
