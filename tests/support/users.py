"""Programs that run as other users. Only root can start them."""

import os
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests import ROOT
from tests.support.server import environment

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as other users")

_OPEN_PYTHON = """
closed=$1 prefix=$2; shift 2
mount --bind "$prefix" /mnt
mount -t tmpfs -o mode=755 none "$closed"
(umask 022; mkdir -p "$prefix")
mount --bind /mnt "$prefix"
exec "$@"
"""
"""Shows a Python installation that is in a directory which only root may enter. The mounts end with the program."""


@dataclass(frozen=True, slots=True)
class User:
    """A user without a home directory and without an entry in /etc/passwd. ``python`` is an interpreter to start."""

    uid: int
    python: str

    def start(self, home: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Starts ``exo`` with these arguments."""
        return subprocess.Popen(
            [self.python, "-m", "exo", *arguments],
            env={**environment(home), **variables},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def exo(self, home: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Exit status, output and standard error of a command."""
        with self.start(home, *arguments, **variables) as process:
            output, error = process.communicate(timeout=120)
        return process.returncode, output, error


@contextmanager
def open_folder() -> Generator[Path]:
    """A temporary directory that every user can enter; pytest's own cannot be."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def make_user(folder: Path, uid: int, *groups: int, umask: int = 0o022) -> User:
    """``folder`` must be one that every user can enter."""
    program = folder / f"python-{uid}"
    also = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    command = [*_with_python(), "setpriv", f"--reuid={uid}", f"--regid={uid}", also, sys.executable]
    names = "HOME USER LOGNAME XDG_DATA_HOME XDG_CACHE_HOME XDG_STATE_HOME XDG_CONFIG_HOME"
    program.write_text(f'#!/bin/sh\numask {umask:o}\nunset {names}\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)
    return User(uid, str(program))


def _with_python() -> Sequence[str]:
    """The beginning of a command for users who may not enter each directory above the interpreter."""
    prefix = Path(sys.base_prefix).resolve()
    closed = next((each for each in reversed(prefix.parents) if not each.stat().st_mode & 0o001), None)
    if closed is None:
        return ()
    return ("unshare", "--mount", "sh", "-ec", _OPEN_PYTHON, "sh", str(closed), str(prefix))
