"""Loads a model as the llama.cpp runner does, and reports the memory of its contexts from llama.cpp's log.

As a program, ``python -m tests.support.engine_memory``, it reads one ``Load`` as JSON on stdin.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import llama_cpp

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Status
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.loader import load

_CACHE = re.compile(rb"(?:KV|RS) buffer size = +([0-9.]+) MiB")
_COMPUTE = re.compile(rb"compute buffer size = +([0-9.]+) MiB")


class ContextMemory(NamedTuple):
    """Bytes that llama.cpp has logged for the context of streams and for that of texts."""

    cache: float
    """Keys, values and recurrent states."""
    compute: float
    text_cache: float
    text_compute: float


def context_memory(command: Load) -> ContextMemory:
    """Loads a model in a process of its own and returns what its contexts take."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.engine_memory"],
        input=command.model_dump_json(),
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    assert run.returncode == 0, run.stderr
    return ContextMemory(*json.loads(run.stdout))


def _measured(command: Load) -> ContextMemory:
    lines = list[bytes]()

    @llama_cpp.llama_log_callback
    def collect(_level: int, text: bytes, _data: object) -> None:
        lines.append(text)

    def report(_: Status) -> None:
        # The loader sets a log of its own before its first report.
        llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))

    try:
        loaded = load(command, report)
    except LoadError:
        sys.stderr.buffer.writelines(lines[-5:])
        raise
    cache, compute = _total(_CACHE, lines), _total(_COMPUTE, lines)
    lines.clear()
    loaded.embedder.open()
    return ContextMemory(cache, compute, _total(_CACHE, lines), _total(_COMPUTE, lines))


def _total(pattern: re.Pattern[bytes], lines: Sequence[bytes]) -> float:
    return sum(float(found[1]) * (1 << 20) for line in lines if (found := pattern.search(line)))


if __name__ == "__main__":
    print(json.dumps(_measured(Load.model_validate_json(sys.stdin.read()))))
