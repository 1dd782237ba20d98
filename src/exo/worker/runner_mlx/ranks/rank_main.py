"""The program of every rank but rank 0: ``python -m exo.worker.runner_mlx.ranks.rank_main ring``. ``ranks`` starts it.

It executes the messages on its standard input. On standard output it writes "up", and "loaded" after joining and
loading, or the reason of a failure. It ends at once when its input closes.
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
    """Runs the program. Does not return."""
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
    """Has Linux kill this process when its parent ends, even if it is stopped or holds the interpreter lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
