"""Why a runner died, in words for whoever has to mend it."""

import re
from collections.abc import Iterable

from exo.worker.protocol.messages import Failed

_DEVICE_MEMORY = (
    "cudamalloc failed",
    "cuda error: out of memory",
    "cudaerrormemoryallocation",
    "cuda_error_out_of_memory",
)
_HOST_MEMORY = (
    "std::bad_alloc",
    "memoryerror",
    "unable to allocate",
    "failed to allocate",
    "cannot allocate memory",
    "memory allocation of",  # as Rust's allocator says it, in which MLX's tokenizers are written
    "out of memory",
)
_NO_DRIVER = ("cuda driver version is insufficient", "no cuda-capable device", "cuda_error_no_device")
_DEVICE = ("cuda error", "cudaerror", "cublas error", "an illegal memory access was encountered")

_ASSERTION = re.compile(r"^(?:\S*/)?([^/\s]+:\d+): (.*(?:GGML_ASSERT|Assertion|GGML_ABORT).*)$", re.MULTILINE)
"""A failed assertion of ggml's or llama.cpp's, behind its place in the source."""
_BACKTRACE = re.compile(
    r"#\d+ |\[New LWP|\[Thread debugging|Using host libthread_db|\[Inferior |This GDB |Enable debuginfod|"
    r"Debuginfod has been|To make this setting|warning: \d+\t|\d+\tin |WARNING: Using native backtrace|"
    r"\S+\(\S*\+0x[0-9a-f]+\) ?\[0x|0x[0-9a-f]+ in |Function\(s\) matching|\d+\t\S+: No such file"
)
"""How the lines begin that debuggers, and ggml where it prints the stack itself, write."""


def without_backtrace(lines: Iterable[str]) -> list[str]:
    """The lines that say what happened, without those that list where the program was."""
    return [line for line in lines if not _BACKTRACE.match(line)]


def diagnose(how: str, stderr: str) -> Failed:
    """The failure of a runner that left no word of its own.

    ``how`` goes on from "the runner", as in "exited with code 1"; ``stderr`` are the last lines of its standard error,
    or nothing.
    """
    low = stderr.lower()

    def says(*signs: str) -> bool:
        return any(sign in low for sign in signs)

    code, plain = "runner_died", ""
    if says(*_DEVICE_MEMORY):
        code = "out_of_memory"
        plain = "; the GPU ran out of memory: fewer slots, a shorter context or a smaller quantisation need less"
    elif says(*_NO_DRIVER):
        plain = "; the NVIDIA driver is missing or older than this CUDA needs"
    elif says(*_DEVICE):
        plain = "; the GPU reported an error, after which nothing that it computes can be trusted"
    elif says(*_HOST_MEMORY):
        code = "out_of_memory"
        plain = "; this machine ran out of memory: fewer slots, a shorter context or a smaller quantisation need less"
    elif how == "was killed by SIGKILL":
        plain = ", which the kernel does when memory runs out"
    if not plain and (failed := _ASSERTION.search(stderr)) is not None:
        plain = f"; {failed[2]} ({failed[1]})"
    last_lines = f"; the end of its standard error:\n{stderr}" if stderr else ""
    return Failed(code=code, message=f"the runner {how}{plain}{last_lines}")
