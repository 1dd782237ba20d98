"""Unpacks the archive, makes the environment, and builds llama.cpp once for the bindings and its own programs."""

import hashlib
import json
import os
import platform
import shutil
import sys
import tarfile
import time
import venv
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_check.options import ROOT, Options
from bench.gpu_check.record import CheckError, Step, run
from bench.gpu_check.toolchain import Cuda, Toolchain, find_toolchain

TARGETS = ("llama", "llama-server", "llama-bench", "llama-batched-bench")
_OFF = ("TESTS", "EXAMPLES", "APP", "UI")
_BYTES_OF_A_COMPILER = 3 << 30
"""The memory that one nvcc may take."""
_SOURCES = Path("archive") / "llama-cpp-python"
_INSTALL_SECONDS = 300.0


def steps(options: Options) -> list[Step]:
    """The steps in order. Each needs those before it."""
    return [
        Step("tools", "build", lambda _: _tools(options)),
        Step("unpack", "build", lambda _: _unpack(options)),
        Step("environment", "build", partial(_make_environment, options)),
        Step("llama.cpp", "build", partial(_build, options)),
    ]


def _tools(options: Options) -> Mapping[str, Any]:
    found = asdict(find_toolchain(cpu=options.cpu))
    # In JSON, paths are text.
    return {**json.loads(json.dumps(found, default=str)), "cpu": options.cpu, "small": options.small}


def _build(options: Options, deadline: float) -> Mapping[str, Any]:
    """Configures and builds, and links the libraries into the bindings. Continues an interrupted build."""
    tools = find_toolchain(cpu=options.cpu)
    folder = options.tools.parent
    source = options.work / _SOURCES / "vendor" / "llama.cpp"
    arguments = cmake_arguments(tools, folder)
    run([tools.cmake, "-S", source, "-B", folder, *arguments], options.logs / "configure.log", deadline)
    jobs = parallel_jobs()
    command = [tools.cmake, "--build", folder, "--parallel", jobs, "--target", *TARGETS]
    run(command, options.logs / "build.log", deadline)
    _install_bindings(options)
    return {"arguments": arguments, "jobs": int(jobs)}


def cmake_arguments(tools: Toolchain, folder: Path) -> list[str]:
    """The options of llama.cpp's own project, for this processor and exactly the GPU that was found."""
    arguments = ["-DCMAKE_BUILD_TYPE=Release", *(f"-DLLAMA_BUILD_{part}=OFF" for part in _OFF)]
    arguments += ["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DGGML_CCACHE=OFF"]
    if tools.ninja is not None:
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"]
    return arguments + (cuda_arguments(tools.cuda, folder) if tools.cuda is not None else [])


def cuda_arguments(cuda: Cuda, folder: Path) -> list[str]:
    """The options for the GPU, with the paths that CMake does not find by itself."""
    arguments = ["-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF", f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}"]
    arguments += [f"-DCMAKE_CUDA_ARCHITECTURES={cuda.gpu.architecture}"]
    beside = [cuda.toolkit / "lib64"]
    if cuda.cublas is not None:
        library = cuda.cublas.library
        light = library.with_name(library.name.replace("cublas", "cublasLt"))
        arguments += [f"-DCUDA_cublas_LIBRARY={library}", f"-DCUDA_cublasLt_LIBRARY={light}"]
        arguments += [f"-DCMAKE_CUDA_FLAGS=-I{_own_headers(cuda.cublas.headers, folder)}"]
        beside.append(library.parent)
    if cuda.driver is None:
        arguments.append("-DGGML_CUDA_NO_VMM=ON")  # the only part that needs libcuda at link time
    else:
        arguments.append(f"-DCUDA_cuda_driver_LIBRARY={cuda.driver}")
        beside.append(cuda.driver.parent)
    # The linker and the loader must find the libraries of libggml-cuda. The loader must not find a stub.
    links = ",".join(f"-rpath-link,{each}" for each in beside)
    loaded = ";".join(str(each) for each in beside if each.name != "stubs")
    return [*arguments, f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,{links}", f"-DCMAKE_BUILD_RPATH={loaded}"]


def _own_headers(headers: Path, folder: Path) -> Path:
    """A folder with cuBLAS's headers only: its package may have headers of another CUDA release than nvcc's."""
    own = folder / "cublas"
    own.mkdir(parents=True, exist_ok=True)
    for header in headers.glob("cublas*.h"):
        (own / header.name).unlink(missing_ok=True)
        (own / header.name).symlink_to(header)
    return own


def parallel_jobs() -> str:
    """The number of cores, or fewer if the memory does not suffice for so many compilers."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return str(max(1, min(len(os.sched_getaffinity(0)), memory // _BYTES_OF_A_COMPILER)))


def _install_bindings(options: Options) -> None:
    """Copies the bindings' modules into the environment, and links the built libraries.

    The bindings load libggml from their own folder, whatever LLAMA_CPP_LIB_PATH says. Through a link it is the same
    file as the one that the programs load.
    """
    package = _site_packages(options) / "llama_cpp"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(options.work / _SOURCES / "llama_cpp", package)
    (package / "lib").mkdir()
    for library in options.tools.glob("lib*.so"):
        (package / "lib" / library.name).symlink_to(library)


def _unpack(options: Options) -> Mapping[str, Any]:
    """Unpacks it into ``archive`` below the work folder. Raises CheckError if it is missing."""
    if not options.archive.exists():
        raise CheckError(
            f"there is no {options.archive}; `make gpu-archive` makes it on a machine with access to packages"
        )
    with tarfile.open(options.archive) as archive:
        archive.extractall(options.work / "archive", filter="data")
    return {"sha256": digest(options.archive)}


def digest(archive: Path) -> str:
    """The archive's hash, which the work folder records."""
    with archive.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_environment(options: Options, deadline: float) -> Mapping[str, Any]:
    """Makes a virtual environment with the archive's wheels and this checkout. Raises CheckError."""
    wheels = options.work / "archive" / "wheels"
    names = sorted({"==".join(wheel.name.split("-")[:2]) for wheel in wheels.glob("*.whl")})
    (pip,) = wheels.glob("pip-*.whl")
    # Without pip, which the Python of some distributions cannot install.
    venv.create(options.work / "venv", symlinks=True, clear=True)
    install = ["install", "--no-index", "--no-deps", "--quiet", "--disable-pip-version-check", "--find-links", wheels]
    try:
        deadline = min(deadline, time.monotonic() + _INSTALL_SECONDS)
        run([options.python, pip / "pip", *install, *names], options.logs / "environment.log", deadline)
    except CheckError as error:
        hint = "make gpu-archive ARGS='--python X.Y' packs for other versions of Python"
        raise CheckError(f"{error}\n(this is Python {platform.python_version()}; {hint})") from None
    (_site_packages(options) / "checkout.pth").write_text(f"{ROOT / 'src'}\n{ROOT}\n")
    return {"python": sys.version, "packages": names}


def _site_packages(options: Options) -> Path:
    (folder,) = (options.work / "venv").glob("lib/python3*/site-packages")
    return folder
