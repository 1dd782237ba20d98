"""The program of every rank but rank 0. ``ranks`` starts it: ``python -m exo.worker.runner_mlx.ranks.rank_main ring
127.0.0.1``, or on another host ``python -m exo.worker.runner_mlx --rank ring 10.0.0.2``.

It executes the messages on its standard input. On standard output it writes "up", its address and its version, and
"loaded" after joining and loading, or the reason of a failure. It ends at once when its input closes.
"""

import ctypes
import signal
import sys
import threading
from queue import SimpleQueue

from exo.worker.protocol.wire import exit_now, take_protocol_stream
from exo.worker.runner_common.main import die
from exo.worker.runner_common.part_process import lines_while_needed

_PR_SET_PDEATHSIG = 1
"""From Linux's sys/prctl.h."""


def main() -> None:
    """Runs the program. Does not return."""
    said = take_protocol_stream()
    sys.excepthook = die
    _end_with_parent()
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(lines,), name="reader", daemon=True).start()
    from exo.worker.runner_mlx.ranks.follower import follow

    follow(lines, said, *sys.argv[-2:])
    exit_now(1)


def _read(lines: SimpleQueue[bytes]) -> None:
    for line in lines_while_needed():
        lines.put(line)
    exit_now(0)


def _end_with_parent() -> None:
    """Has Linux kill this process when its parent ends, even if it is stopped or holds the interpreter lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
