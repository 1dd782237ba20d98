"""The file that takes what a runner writes to standard error."""

import os
import threading
from pathlib import Path

from exo.worker.supervisor.crash_report import StderrLog


def test_a_log_that_is_open_elsewhere_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cuda-model-1.log"
    logs = [StderrLog(path) for _ in range(3)]  # as of three servers
    for number, log in enumerate(logs):
        log.write(b"line of %d\n" % number)
        log.close()
    names = ["cuda-model-1.log", "cuda-model-1-server-2.log", "cuda-model-1-server-3.log"]
    assert [(tmp_path / name).read_text() for name in names] == ["line of 0\n", "line of 1\n", "line of 2\n"]
    again = StderrLog(path)
    again.write(b"more\n")
    again.close()
    assert path.read_text() == "line of 0\nmore\n"


def test_a_disk_that_does_not_take_it_holds_up_nobody(tmp_path: Path) -> None:
    """A named pipe that nobody reads takes 64 KiB, and then nothing."""
    path = tmp_path / "log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = StderrLog(path)

    def write() -> None:
        for _ in range(1000):
            log.write(b"x" * 65_535 + b"\n")
        log.write(b"the last line\n")
        log.close()

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(60)
    assert not writing.is_alive()
    assert log.last_lines().endswith("the last line")
    os.close(reader)
