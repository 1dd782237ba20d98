"""Finds the tools of this machine: compilers, the GPU and its driver, and cuBLAS, which may be a Python package."""

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
"""Usual folders that are often missing from PATH."""
SYSTEM = Path("/usr")
"""The folder of a distribution's own cuBLAS."""
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: str
    """Such as "9.0"."""
    driver: str
    memory_mib: int

    @property
    def architecture(self) -> str:
        """CMake's name of machine code for exactly this GPU."""
        return f"{self.capability.replace('.', '')}-real"


@dataclass(frozen=True, slots=True)
class Cublas:
    """cuBLAS outside the CUDA toolkit."""

    headers: Path
    library: Path
    """Its name ends with the version; libcublasLt is beside it."""


@dataclass(frozen=True, slots=True)
class Cuda:
    """The parts of a CUDA build. ``cublas`` is None if CMake finds it beside the compiler."""

    nvcc: str
    version: str
    toolkit: Path
    """The folder with nvcc's bin and the run-time library's lib64."""
    gpu: Gpu
    cublas: Cublas | None
    driver: Path | None
    """libcuda or its stub; None without either."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """All tools. ``cuda`` is None for a CPU build."""

    cmake: str
    ninja: str | None
    cuda: Cuda | None


def find_toolchain(*, cpu: bool) -> Toolchain:
    """Raises CheckError, which names the missing tool."""
    cmake = _program("cmake")
    if cmake is None:
        raise CheckError("there is no cmake in PATH; llama.cpp is built with CMake 3.18 or newer")
    if not any(_program(name) for name in ("c++", "g++", "clang++")):
        raise CheckError("there is no C++ compiler (c++, g++ or clang++) in PATH")
    return Toolchain(cmake, _program("ninja"), None if cpu else find_cuda())


def find_cuda() -> Cuda:
    """Raises CheckError, which names the missing tool."""
    gpu = find_gpu()
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("nvcc", path=CUDA_BIN)
    if nvcc is None:
        raise CheckError(f"there is no nvcc in PATH or {CUDA_BIN}: the CUDA toolkit's compiler is needed")
    found = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    if found is None:
        raise CheckError(f"{nvcc} --version does not state a CUDA release")
    toolkit = _toolkit(nvcc)
    cublas = None if _has_cublas(toolkit) else _packaged_cublas(found[1].partition(".")[0])
    return Cuda(nvcc, found[1], toolkit, gpu, cublas, _driver_library(toolkit))


def find_gpu() -> Gpu:
    """Raises CheckError if the driver does not answer or lists no GPU."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=DRIVER_BIN)
    if smi is None:
        raise CheckError("there is no nvidia-smi: no NVIDIA driver here; --cpu --small tries the script without a GPU")
    fields = "name,compute_cap,driver_version,memory.total"
    lines = _output([smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]).strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != 4 or not re.fullmatch(r"\d+\.\d+", values[1]):
        raise CheckError(f"nvidia-smi lists no GPU: {' '.join(lines) or 'no output'}")
    return Gpu(values[0], values[1], values[2], int(values[3]) if values[3].isdigit() else 0)


def _program(name: str) -> str | None:
    """A program in PATH or beside this Python, whose packages may have installed it."""
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
    """The folder above nvcc's own, even if the nvcc in PATH is a script that calls it."""
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
    """The cuBLAS of a package nvidia-cublas, whose layout varies with the CUDA release. Raises CheckError."""
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
    """The package folders of this Python and of the others in PATH."""
    yield from (Path(entry) for entry in sys.path if entry)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield from Path(folder).parent.glob("lib/python3*/*-packages")


def _driver_library(toolkit: Path) -> Path | None:
    stubs = [toolkit / name / "stubs" for name in ("lib64", "targets/x86_64-linux/lib")]
    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep), *DRIVER_FOLDERS, *stubs]
    files = (Path(folder) / name for folder in folders if folder for name in ("libcuda.so.1", "libcuda.so"))
    return next((file for file in files if file.exists()), None)
