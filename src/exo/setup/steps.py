"""Functions that all setups use: progress, programs, wheels, the cache. They need the standard library only."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from exo.exit_code import CommandError
from exo.worker.protocol.nvidia_driver import DriverError, driver

_SHOWN_SECONDS = 10.0
"""Between two lines of a long build's progress."""
_LAST_LINES = 40

Argument = str | Path


class SetupError(CommandError):
    """A step failed; the message says which, why and, if there is something, what to do."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"==> {text}", flush=True)


@contextmanager
def step(text: str) -> Generator[None]:
    """Says what begins, and afterwards how long it took."""
    say(text)
    began = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - began:.0f} s", flush=True)


def run(command: Sequence[Argument]) -> None:
    """Runs a program with its output shown. Raises SetupError."""
    try:
        status = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
    except OSError as error:
        raise SetupError(f"{command[0]} does not start: {error}") from error
    if status:
        raise SetupError(f"{Path(command[0]).name} failed with status {status}: {' '.join(map(str, command))[:300]}")


def run_build(command: Sequence[Argument], log: Path, environment: Mapping[str, str]) -> None:
    """Runs a build with its output in a log, showing the compiler's own count of steps now and then.

    Raises SetupError after printing the end of the log.
    """
    began = shown = time.monotonic()
    with (
        log.open("a") as file,
        subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as build,
    ):
        assert build.stdout is not None
        for line in build.stdout:
            file.write(line)
            text = line.strip()
            if text.startswith("[") and "]" in text and time.monotonic() - shown > _SHOWN_SECONDS:
                shown = time.monotonic()
                print(f"    {shown - began:4.0f} s  {text[:100]}", flush=True)
    if build.returncode:
        sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-_LAST_LINES:]))
        raise SetupError(f"the build failed; the whole log is in {log}")


def pip_command() -> list[Argument]:
    """The command of a pip that installs into this environment. Raises SetupError."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uvx := shutil.which("uvx"):
        return [uvx, "pip", "--python", sys.executable, "--disable-pip-version-check"]
    raise SetupError(f"{sys.executable} has no pip, and there is no uvx in PATH")


def has_gpu() -> bool:
    """Whether there is an NVIDIA driver with a GPU, or one that does not answer."""
    try:
        present = driver()
    except DriverError:
        return True
    return present is not None and bool(present.capabilities)


def install_wheels(requirements: Sequence[str], prefix: Path) -> None:
    """Installs wheels below a folder of their own, where no other package sees them. Raises SetupError."""
    options = ("--progress-bar", "on", "--quiet", "--no-deps", "--ignore-installed", "--only-binary=:all:")
    run([*pip_command(), "install", *options, "--no-warn-script-location", "--prefix", prefix, *requirements])


def finished(folder: Path) -> bool:
    """Whether a folder's content is whole, see ``finish``."""
    return (folder / ".finished").exists()


def finish(folder: Path) -> None:
    """Marks a folder's content as whole, so that a step that was interrupted is done again."""
    (folder / ".finished").touch()


def digest(*parts: str) -> str:
    """A short hash of a step's inputs."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
