"""Runs another program to its end, or to the end of its time."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.gpu_check.record import CheckError

_SHOWN_LINES = 12


def run(command: Sequence[str | Path], log: Path, deadline: float, environment: Mapping[str, str] | None = None) -> str:
    """What it wrote to standard output; ``log`` gets all it says.

    Raises CheckError with the end of the log where it fails or has to be ended, with its children, at ``deadline``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output = log.with_suffix(".out")
    with log.open("w") as errors, output.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=errors,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise CheckError(f"{Path(command[0]).name} was not done in time; its log is {log}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = output.read_text(errors="replace")
    if code:
        lines = [line for line in (said + log.read_text(errors="replace")).splitlines() if line.strip()]
        end = "\n".join(lines[-_SHOWN_LINES:])
        raise CheckError(f"{Path(command[0]).name} ended with {code}; its log is {log} and ends with:\n{end}")
    return said
