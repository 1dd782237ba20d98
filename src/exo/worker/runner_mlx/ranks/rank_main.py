"""A rank but the first as a program, which ``ranks`` starts: ``python -m exo.worker.runner_mlx.ranks.rank_main ring``.

It does what rank 0 writes on its standard input, and says on its standard output that it is "up" and, after joining and
loading, "loaded", or why it is not. It ends when its input closes, whatever it is doing.
"""

import ctypes
import signal
import sys
import threading
import traceback
from queue import SimpleQueue
from types import TracebackType

from exo.worker.protocol.wire import exit_now, take_protocol_stream

_PR_SET_PDEATHSIG = 1
"""From Linux's sys/prctl.h."""


def main() -> None:
    """Does not return."""
    said = take_protocol_stream()
    sys.excepthook = _die
    _end_with_parent()
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), name="reader", daemon=True).start()
    from exo.worker.runner_mlx.ranks.follower import follow

    follow(lines, said, sys.argv[1])
    exit_now(1)


def _die(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    exit_now(1)


def _read(lines: SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    exit_now(0)


def _end_with_parent() -> None:
    """On Linux the kernel sees to it, even if this process is stopped or its interpreter is locked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
