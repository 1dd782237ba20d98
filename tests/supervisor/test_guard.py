"""What the guard leaves of a program on a host: nothing, when the program or its input has ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.hosts import wait_until

PROGRAM = """
import os, sys, time
child = os.fork()
if child == 0:
    time.sleep(1000)
print(os.getpid(), child, flush=True)
if "deaf" in sys.argv:
    time.sleep(1000)
sys.stdin.read()
sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "guarded_program.py").write_text(PROGRAM)
    return tmp_path


def start(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """The process, and the ids of the program and its child."""
    command = [sys.executable, "-m", "exo.worker.guard", "--label", "server:one", "guarded_program", *arguments]
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


def gone(pids: list[int]) -> bool:
    def has_ended(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(map(has_ended, pids))


def test_the_program_takes_the_guards_place_and_its_child_ends_with_it(folder: Path) -> None:
    process, pids = start(folder)
    assert pids[0] == process.pid
    assert "label=server:one" in psutil.Process(process.pid).cmdline()
    process.communicate()
    assert process.returncode == 7
    wait_until(lambda: gone(pids))


def test_a_killed_program_leaves_no_child(folder: Path) -> None:
    process, pids = start(folder)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: gone(pids))
    process.communicate()


def test_a_program_that_does_not_hear_the_end_of_its_input_is_killed(folder: Path) -> None:
    process, pids = start(folder, "deaf")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: gone(pids))
    assert process.stdout is not None
    process.stdout.close()
