"""Another process that computes while servers are measured."""

import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Busy:
    """A process that computes without end, in its own session or in that of the servers.

    The kernel schedules a session as a group. llama-server runs in this program's session, each runner of exo in its
    own.
    """

    own_session: bool
    one_core: bool = False
    """Whether it stays on one core."""

    @contextmanager
    def running(self) -> Generator[None]:
        """Runs it during the block, and two seconds before."""
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=self.own_session)
        try:
            if self.one_core:
                os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
            time.sleep(2)
            yield
        finally:
            process.kill()
            process.wait()
