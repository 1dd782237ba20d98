"""The tools of this machine: compilers, the card and its driver, and cuBLAS, which may lie among Python's packages."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_check.record import CheckError

CUDA_BIN, DRIVER_BIN = "/usr/local/cuda/bin", "/usr/local/nvidia/bin"
"""Where they often are, and PATH does not lead."""
SYSTEM = Path("/usr")
"""Where a distribution's own packages put cuBLAS."""
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")


@dataclass(frozen=True, slots=True)
class Card:
    """The first NVIDIA card that the driver lists."""

    name: str
    capability: str
    """Such as "9.0"."""
    driver: str
    memory_mib: int

    @property
    def architecture(self) -> str:
        """What CMake calls machine code for exactly this card."""
        return f"{self.capability.replace('.', '')}-real"


@dataclass(frozen=True, slots=True)
class Cublas:
    """cuBLAS outside the CUDA toolkit."""

    headers: Path
    library: Path
    """With its version number at the end; libcublasLt lies beside it."""


@dataclass(frozen=True, slots=True)
class Cuda:
    """What a build for a card needs. ``cublas`` is None where CMake finds it by itself, beside the compiler."""

    nvcc: str
    version: str
    toolkit: Path
    """The folder that holds nvcc's bin and the run-time library's lib64."""
    card: Card
    cublas: Cublas | None
    driver: Path | None
    """libcuda, or its stub; None where there is neither."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Everything; ``cuda`` is None for a build for the CPU."""

    cmake: str
    ninja: str | None
    cuda: Cuda | None


def find_toolchain(*, cpu: bool) -> Toolchain:
    """Raises CheckError that names what is missing."""
    cmake = _program("cmake")
    if cmake is None:
        raise CheckError("there is no cmake in PATH; llama.cpp is built with CMake 3.18 or newer")
    if not any(_program(name) for name in ("c++", "g++", "clang++")):
        raise CheckError("there is no C++ compiler (c++, g++ or clang++) in PATH")
    return Toolchain(cmake, _program("ninja"), None if cpu else find_cuda())


def find_cuda() -> Cuda:
    """Raises CheckError that names what is missing."""
    card = find_card()
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("nvcc", path=CUDA_BIN)
    if nvcc is None:
        raise CheckError(f"there is no nvcc in PATH or {CUDA_BIN}: the CUDA toolkit's compiler is needed")
    found = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    if found is None:
        raise CheckError(f"{nvcc} --version does not tell a release of CUDA")
    toolkit = _toolkit(nvcc)
    cublas = None if _has_cublas(toolkit) else _packaged_cublas(found[1].partition(".")[0])
    return Cuda(nvcc, found[1], toolkit, card, cublas, _driver_library(toolkit))


def find_card() -> Card:
    """Raises CheckError where the driver does not answer or lists none."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=DRIVER_BIN)
    if smi is None:
        raise CheckError("there is no nvidia-smi: no NVIDIA driver here; --cpu --small proves the script without one")
    fields = "name,compute_cap,driver_version,memory.total"
    lines = _output([smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]).strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != 4 or not re.fullmatch(r"\d+\.\d+", values[1]):
        raise CheckError(f"nvidia-smi lists no card: {' '.join(lines) or 'it says nothing'}")
    return Card(values[0], values[1], values[2], int(values[3]) if values[3].isdigit() else 0)


def _program(name: str) -> str | None:
    """In PATH, or beside this Python, whose packages bring programs too."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise CheckError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        raise CheckError(f"{command[0]} fails: {(done.stdout + done.stderr).strip()[:300]}")
    return done.stdout


def _toolkit(nvcc: str) -> Path:
    """The folder above nvcc's own, also where the nvcc in PATH is a script that calls it."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    here = re.search(r"_HERE_=(.+)", done.stderr)
    return (Path(here[1].strip()) if here else Path(nvcc).resolve().parent).parent


def _has_cublas(toolkit: Path) -> bool:
    places = (toolkit, toolkit / "targets" / "x86_64-linux", SYSTEM)
    headers = any((place / "include" / "cublas_v2.h").exists() for place in places)
    folders = (place / name for place in places for name in ("lib64", "lib", "lib/x86_64-linux-gnu"))
    return headers and any((folder / "libcublas.so").exists() for folder in folders)


def _packaged_cublas(major: str) -> Cublas:
    """From a package nvidia-cublas, of which each release of CUDA has its own layout. Raises CheckError."""
    for packages in _package_folders():
        for library in sorted(packages.glob(f"nvidia/*/lib/libcublas.so.{major}")):
            headers = library.parent.parent / "include"
            if (headers / "cublas_v2.h").exists() and library.with_name(f"libcublasLt.so.{major}").exists():
                return Cublas(headers, library)
    raise CheckError(
        f"there is no cuBLAS for CUDA {major}, neither beside nvcc nor among this Python's packages (nvidia-cublas): "
        "llama.cpp does not link without it"
    )


def _package_folders() -> Iterator[Path]:
    """Of this Python, and of the others in PATH."""
    yield from (Path(entry) for entry in sys.path if entry)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield from Path(folder).parent.glob("lib/python3*/*-packages")


def _driver_library(toolkit: Path) -> Path | None:
    stubs = [toolkit / name / "stubs" for name in ("lib64", "targets/x86_64-linux/lib")]
    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep), *DRIVER_FOLDERS, *stubs]
    files = (Path(folder) / name for folder in folders if folder for name in ("libcuda.so.1", "libcuda.so"))
    return next((file for file in files if file.exists()), None)
