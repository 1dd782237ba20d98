"""Runs a module of exo on a host: ``python -m exo.worker.guard [--label LABEL] MODULE ARGUMENTS``.

This process becomes the module's program, in the Python of the runner that it belongs to. A second process watches it:
when standard input hangs up, because the server or the connection is gone, the program has a few seconds to end, and
when it has ended, nothing of its process group stays.
"""

import os
import select
import signal
import sys
from contextlib import suppress

from exo.worker.protocol.runners import RUNNERS

_GRACE_SECONDS = 10.0
_ANY_HANGUP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


def main() -> None:
    """Does not return."""
    arguments = sys.argv[1:]
    options: list[str] = []
    if arguments[0] == "--label":
        options = ["-X", f"label={arguments[1]}"]
        del arguments[:2]
    module = arguments[0]
    owner = next((spec for spec in RUNNERS.values() if f"{module}.".startswith(f"{spec.module}.")), None)
    python = sys.executable if owner is None else owner.interpreter
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    if hasattr(os, "pidfd_open"):
        _watch(os.getpid())
    os.execv(python, [python, "-X", "utf8", *options, "-m", *arguments])


def _watch(program: int) -> None:
    """Starts the watching process, which is no child of the program."""
    handle = os.pidfd_open(program)
    if (child := os.fork()) == 0:
        if os.fork() == 0:
            with suppress(BaseException):
                _end_with_input(program, handle)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(handle)


def _end_with_input(program: int, handle: int) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):  # a reader of the program's output must see its end
        os.dup2(nothing, descriptor)
    poll = select.poll()
    poll.register(0, _ANY_HANGUP)
    poll.register(handle, select.POLLIN)
    if all(descriptor != handle for descriptor, _ in poll.poll()):
        poll.unregister(0)
        poll.poll(_GRACE_SECONDS * 1000)
    os.killpg(program, signal.SIGKILL)


if __name__ == "__main__":
    main()
