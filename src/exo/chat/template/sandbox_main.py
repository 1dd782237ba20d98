"""What the programs behind ``LimitedProcess`` have in common: limits, and a line out for every line in."""

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress


def serve(answer: Callable[[bytes], Mapping[str, str]], *, seconds: int, address_space: int) -> None:
    """Answers lines of standard input until it closes. The first line out only says that the process is up.

    A line may take ``seconds`` of wall time, the process map ``address_space`` bytes of memory and write no file.
    """
    for limit, value in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # not every system can limit address space; the deadline still holds
            resource.setrlimit(limit, (value, value))
    _write({})
    for line in sys.stdin.buffer:
        # Unhandled, SIGALRM ends the process even inside one endless C call, and even if its owner is gone.
        signal.alarm(seconds + 1)
        reply = answer(line)
        signal.alarm(0)
        _write(reply)


def _write(reply: Mapping[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    sys.stdout.buffer.flush()
