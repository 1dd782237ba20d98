"""The archive, unpacked, and an environment with nothing but what is in it and this checkout."""

import hashlib
import platform
import sys
import tarfile
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu_check.options import ROOT, Options
from bench.gpu_check.program import run
from bench.gpu_check.record import CheckError

SOURCES = Path("archive") / "llama-cpp-python"
_INSTALL_SECONDS = 300.0


def unpack(options: Options) -> Mapping[str, Any]:
    """Into ``archive`` below the work folder. Raises CheckError where there is no archive."""
    if not options.archive.exists():
        raise CheckError(f"there is no {options.archive}; make gpu-archive makes it, where packages can be fetched")
    with tarfile.open(options.archive) as archive:
        archive.extractall(options.work / "archive", filter="data")
    return {"sha256": digest(options.archive)}


def digest(archive: Path) -> str:
    """By which the work folder remembers what it was made from."""
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_environment(options: Options, deadline: float) -> Mapping[str, Any]:
    """A virtual environment with the archive's wheels, in which this checkout can be imported. Raises CheckError."""
    wheels = options.work / "archive" / "wheels"
    names = sorted({"==".join(wheel.name.split("-")[:2]) for wheel in wheels.glob("*.whl")})
    (pip,) = wheels.glob("pip-*.whl")
    # No pip of its own: some distributions' Python cannot give one.
    venv.create(options.work / "venv", symlinks=True, clear=True)
    install = ["install", "--no-index", "--no-deps", "--quiet", "--disable-pip-version-check", "--find-links", wheels]
    try:
        deadline = min(deadline, time.monotonic() + _INSTALL_SECONDS)
        run([options.python, pip / "pip", *install, *names], options.logs / "environment.log", deadline)
    except CheckError as error:
        hint = "make gpu-archive ARGS='--python X.Y' packs for other versions of Python"
        raise CheckError(f"{error}\n(this is Python {platform.python_version()}; {hint})") from None
    (site_packages(options) / "checkout.pth").write_text(f"{ROOT / 'src'}\n{ROOT}\n")
    return {"python": sys.version, "packages": names}


def site_packages(options: Options) -> Path:
    """Of the environment."""
    (folder,) = (options.work / "venv").glob("lib/python3*/site-packages")
    return folder
