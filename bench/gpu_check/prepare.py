"""Unpacks the archive, fits the plug-in to this machine, and makes the environment with the bindings."""

import ctypes
import hashlib
import os
import platform
import shutil
import sys
import tarfile
import time
import venv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_check.options import ROOT, Options
from bench.gpu_check.record import CheckError, CheckStep, run
from exo.worker.protocol.nvidia_driver import DriverError, driver
from exo.worker.runner_cuda.plugin import BASE, LIBRARY, needed_libraries, read_plugin

STAGE = "prepare"
TOOLKITS = ("/usr/local/cuda/lib64", "/opt/cuda/lib64")
_INSTALL_SECONDS = 120.0


def steps(options: Options) -> list[CheckStep]:
    """The steps in order. Each needs those before it."""
    unpack = CheckStep("unpack", STAGE, lambda _: _unpack(options))
    plugin = CheckStep("plug-in", STAGE, lambda _: _fit_plugin(options))
    environment = CheckStep("environment", STAGE, partial(_make_environment, options))
    return [unpack, environment] if options.cpu else [unpack, plugin, environment]


def _unpack(options: Options) -> Mapping[str, Any]:
    """Unpacks the archive into the work folder. Raises CheckError if it is missing."""
    if not options.archive.exists():
        raise CheckError(f"there is no {options.archive}; `make gpu-archive` makes it on a machine with a network")
    with tarfile.open(options.archive) as archive:
        archive.extractall(options.unpacked, filter="data")
    return {"sha256": digest(options.archive), "cpu": options.cpu, "small": options.small}


def digest(archive: Path) -> str:
    """The archive's hash, which the work folder records."""
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_environment(options: Options, deadline: float) -> Mapping[str, Any]:
    """Makes a virtual environment with the archive's wheels, its bindings and this checkout. Raises CheckError."""
    wheels = options.unpacked / "wheels"
    names = sorted({"==".join(wheel.name.split("-")[:2]) for wheel in wheels.glob("*.whl")})
    (pip,) = wheels.glob("pip-*.whl")
    # Without pip, which the Python of some distributions cannot install.
    venv.create(options.work / "venv", symlinks=True, clear=True)
    install = ["install", "--no-index", "--no-deps", "--quiet", "--no-compile", "--disable-pip-version-check"]
    try:
        deadline = min(deadline, time.monotonic() + _INSTALL_SECONDS)
        command = [options.python, pip / "pip", *install, "--find-links", wheels, *names]
        run(command, options.logs / "environment.log", deadline)
    except CheckError as error:
        hint = "make gpu-archive ARGS='--python X.Y' packs for another version of Python"
        raise CheckError(f"{error}\n(this is Python {platform.python_version()}; {hint})") from None
    (packages,) = (options.work / "venv").glob("lib/python3*/site-packages")
    (packages / "checkout.pth").write_text(f"{ROOT / 'src'}\n{ROOT}\n")
    shutil.copytree(options.unpacked / "llama_cpp", packages / "llama_cpp")
    own = packages / "llama_cpp" / "lib"
    own.mkdir()
    for library in options.programs.glob("lib*.so*"):
        # The same files as the programs load, by the names that the bindings and the plug-in look for.
        for name in {library.name, f"{library.name.partition('.so')[0]}.so"}:
            (own / name).symlink_to(library)
    return {"python": sys.version, "packages": names}


def _fit_plugin(options: Options) -> Mapping[str, Any]:
    """Describes the plug-in with the CUDA libraries of this machine. Raises CheckError if it cannot run here."""
    try:
        present = driver()
    except DriverError as error:
        raise CheckError(str(error)) from None
    if present is None or not present.capabilities:
        raise CheckError("there is no NVIDIA driver with a GPU here; --cpu --small tries the script without one")
    packed = options.unpacked / "plugin"
    plugin = read_plugin(packed)
    assert plugin is not None, "the archive has one"
    if why := plugin.why_not(present):
        wanted = ";".join(f"{major}{minor}-real" for major, minor in sorted({*present.capabilities}))
        raise CheckError(f"{why}; make gpu-archive ARGS='--archs {wanted}' packs a plug-in for this machine")
    libraries = cuda_libraries(plugin.cuda[0])
    shutil.rmtree(options.plugin, ignore_errors=True)
    options.plugin.mkdir()
    (options.plugin / LIBRARY).symlink_to(packed / LIBRARY)
    (options.plugin / BASE).symlink_to(options.programs / f"{BASE}.0")
    replace(plugin, libraries=libraries).write(options.plugin)
    return {"driver": present.version, "cuda": present.cuda, "gpus": present.capabilities, "libraries": libraries}


def cuda_libraries(major: int) -> tuple[str, ...]:
    """Folders of the libraries that the plug-in links to, without those that the loader knows. Raises CheckError."""
    found: dict[str, None] = {}
    for name in needed_libraries(major)[1:]:
        folder = next((each for each in _places() if (each / name).exists()), None)
        if folder is not None:
            found[str(folder)] = None
        elif not _loads(name):
            raise CheckError(
                f"there is no {name}: not in the Python packages nvidia-cuda-runtime and nvidia-cublas of a Python in "
                f"PATH, not in {' or '.join(TOOLKITS)}, and not where the loader looks"
            )
    return tuple(found)


def _places() -> Iterator[Path]:
    """Folders of NVIDIA's packages of this Python and of the others in PATH, and of CUDA toolkits."""
    packages = [Path(entry) for entry in sys.path if entry]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        packages += Path(folder).parent.glob("lib/python3*/*-packages")
    for each in packages:
        yield from sorted(each.glob("nvidia/*/lib"))
    yield from map(Path, TOOLKITS)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
