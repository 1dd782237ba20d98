"""A runner's standard error: its log file, and the diagnosis of a crash from its last lines."""

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO, final

from exo.store.sharing import make_directory, share
from exo.worker.protocol.events import Failed

log = logging.getLogger(__name__)

_STDERR = 2
_LOG_BYTES = 8 << 20
_UNWRITTEN_BYTES = 8 << 20
"""Data that may wait for a slow disk. The file lacks the rest."""
_LOG_CLOSE_SECONDS = 1.0
_TAIL_BYTES = 32 << 10
_SHOWN_CHARACTERS = 4 << 10
_TAIL_LINES = 20

_DEVICE_MEMORY = (
    "cudamalloc failed",
    "cuda error: out of memory",
    "cudaerrormemoryallocation",
    "cuda_error_out_of_memory",
    "erroroutofdevicememory",  # Vulkan's
)
_HOST_MEMORY = (
    "std::bad_alloc",
    "memoryerror",
    "unable to allocate",
    "failed to allocate",
    "cannot allocate memory",
    "memory allocation of",  # Rust's allocator, and with it MLX's tokenizers
    "out of memory",
)
_NO_DRIVER = ("cuda driver version is insufficient", "no cuda-capable device", "cuda_error_no_device")
_DEVICE = ("cuda error", "cudaerror", "cublas error", "an illegal memory access was encountered", "errordevicelost")

_LOST_PART = ("remote rpc server crashed", "the runner cannot compute without it")
"""llama.cpp's message, and that of ``part_process``."""

_ASSERTION = re.compile(r"^(?:\S*/)?([^/\s]+:\d+): (.*(?:GGML_ASSERT|Assertion|GGML_ABORT).*)$", re.MULTILINE)
"""A failed assertion in ggml or llama.cpp, after its place in the source."""
_CRASHES = tuple(f"was killed by {signal}" for signal in ("SIGABRT", "SIGFPE", "SIGSEGV", "SIGBUS", "SIGILL"))
_BACKTRACE = re.compile(
    r"#\d+ |\[New LWP|\[Thread debugging|Using host libthread_db|\[Inferior |This GDB |Enable debuginfod|"
    r"Debuginfod has been|To make this setting|warning: \d+\t|\d+\tin |WARNING: Using native backtrace|"
    r"\S+\(\S*\+0x[0-9a-f]+\) ?\[0x|0x[0-9a-f]+ in |Function\(s\) matching|\d+\t\S+: No such file"
)
"""The beginnings of lines from debuggers and from ggml's own backtrace."""


@final
class StderrLog:
    """Appends a child's standard error to a file, which is emptied at 8 MiB, and keeps the end in memory.

    A thread writes the file, so that a slow disk cannot block the event loop. If another process writes the same log,
    this one goes to a file with a number in its name. A log that cannot be written goes to the server's standard error.
    Raises ``OSError`` if that is impossible, too.
    """

    def __init__(self, path: Path) -> None:
        self._is_file = True
        try:
            make_directory(path.parent)
            self._file = _open_alone(path)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            self._file, self._is_file = os.fdopen(os.dup(_STDERR), "wb", buffering=0), False
            _warn_of_unwritable(path.parent, error.strerror)
        self._tail = b""
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._queued = 0  # bytes; the event loop's thread is the only writer
        self._done = 0  # bytes; the log's thread is the only writer
        self._thread = Thread(target=self._write_all, name="runner log", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Never blocks. A full or slow disk loses lines of the file, and nothing else."""
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._queued - self._done <= _UNWRITTEN_BYTES:
            self._queued += len(data)
            self._queue.put(data)

    def last_lines(self) -> str:
        """At most the last 20 lines and 4 KiB, without a debugger's backtrace."""
        lines = _without_backtrace(self._tail.decode(errors="replace").splitlines())
        return "\n".join(lines[-_TAIL_LINES:])[-_SHOWN_CHARACTERS:]

    def close(self) -> None:
        """Has the queued data written and the file closed; waits at most a second. ``last_lines`` still works."""
        self._queue.put(None)
        self._thread.join(_LOG_CLOSE_SECONDS)

    def _write_all(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        while (data := self._queue.get()) is not None:
            with suppress(OSError):
                if self._is_file and size > _LOG_BYTES:
                    self._file.truncate(0)
                    size = 0
                size += self._file.write(data)
            self._done += len(data)
        self._file.close()


@cache
def _warn_of_unwritable(directory: Path, reason: str) -> None:
    log.warning("%s cannot be written (%s); the logs of the runners go to standard error", directory, reason)


def _open_alone(path: Path) -> BinaryIO:
    """Opens a log for appending: ``path``, or the first of ``name-server-2.log`` and so on that nobody has open."""
    for number in count(1):
        own = path if number == 1 else path.with_stem(f"{path.stem}-server-{number}")
        file = own.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        except OSError:
            pass  # a file system without locks
        share(file.fileno(), path.parent)
        return file
    raise AssertionError  # count never ends


def _without_backtrace(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if not _BACKTRACE.match(line)]


def diagnose(how: str, stderr: str, *, loading: bool = False) -> Failed:
    """The failure of a runner that did not report one itself.

    ``how`` is the predicate of "the runner", such as "exited with code 1". ``stderr`` is the end of its standard error.
    An engine that crashes in its own code while it is ``loading`` a model would do so again.
    """
    low = stderr.lower()

    def mentions(*signs: str) -> bool:
        return any(sign in low for sign in signs)

    code, cause = "runner_died", ""
    if mentions(*_DEVICE_MEMORY):
        code = "out_of_memory"
        cause = "; the GPU ran out of memory: fewer slots, a shorter context or a smaller quantisation need less"
    elif mentions(*_NO_DRIVER):
        cause = "; the NVIDIA driver is missing, or too old for this version of CUDA: update the driver"
    elif mentions(*_LOST_PART):
        cause = "; a process or a host that had a part of the model has gone"
    elif mentions(*_DEVICE):
        cause = "; the GPU reported an error, after which its results cannot be trusted"
    elif mentions(*_HOST_MEMORY):
        code = "out_of_memory"
        cause = "; this machine ran out of memory: fewer slots, a shorter context or a smaller quantisation need less"
    elif how == "was killed by SIGKILL":
        cause = ", which the kernel does when memory runs out"
    elif (failed := _ASSERTION.search(stderr)) is not None:
        cause = f"; {failed[2]} ({failed[1]})"
        if loading:
            reason = "the engine gave up on the model, which is broken or of a kind that this version does not know"
            return Failed(code="model_load_failed", message=reason + cause)
    elif loading and how in _CRASHES:
        code, cause = "model_load_failed", " while it loaded the model"
    last_lines = f"; the end of its standard error:\n{stderr}" if stderr else ""
    return Failed(code=code, message=f"the runner {how}{cause}{last_lines}")
