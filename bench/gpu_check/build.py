"""llama.cpp built once: the same libraries under the bindings, llama-server and llama.cpp's own benchmarks."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_check.environment import SOURCES, make_environment, site_packages, unpack
from bench.gpu_check.options import Options
from bench.gpu_check.program import run
from bench.gpu_check.record import Step
from bench.gpu_check.toolchain import Cuda, Toolchain, find_toolchain

TARGETS = ("llama", "llama-server", "llama-bench", "llama-batched-bench")
_OFF = ("TESTS", "EXAMPLES", "APP", "UI")
_BYTES_OF_A_COMPILER = 3 << 30
"""Of memory that one nvcc may take."""


def steps(options: Options) -> list[Step]:
    """In order; each needs those before it."""
    return [
        Step("tools", "build", lambda _: _tools(options)),
        Step("unpack", "build", lambda _: unpack(options)),
        Step("environment", "build", partial(make_environment, options)),
        Step("llama.cpp", "build", partial(build, options)),
    ]


def _tools(options: Options) -> Mapping[str, Any]:
    found = asdict(find_toolchain(cpu=options.cpu))
    # As JSON: paths are text there.
    return {**json.loads(json.dumps(found, default=str)), "cpu": options.cpu, "small": options.small}


def build(options: Options, deadline: float) -> Mapping[str, Any]:
    """Configures, builds, and puts the libraries where the bindings look. A build that was cut short goes on."""
    tools = find_toolchain(cpu=options.cpu)
    folder = options.tools.parent
    source = options.work / SOURCES / "vendor" / "llama.cpp"
    arguments = cmake_arguments(tools, folder)
    run([tools.cmake, "-S", source, "-B", folder, *arguments], options.logs / "configure.log", deadline)
    jobs = parallel_jobs()
    command = [tools.cmake, "--build", folder, "--parallel", jobs, "--target", *TARGETS]
    run(command, options.logs / "build.log", deadline)
    install_bindings(options)
    return {"arguments": arguments, "jobs": int(jobs)}


def cmake_arguments(tools: Toolchain, folder: Path) -> list[str]:
    """For llama.cpp's own project, for this processor and exactly the card found."""
    arguments = ["-DCMAKE_BUILD_TYPE=Release", *(f"-DLLAMA_BUILD_{part}=OFF" for part in _OFF)]
    arguments += ["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DGGML_CCACHE=OFF"]
    if tools.ninja is not None:
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"]
    return arguments + (cuda_arguments(tools.cuda, folder) if tools.cuda is not None else [])


def cuda_arguments(cuda: Cuda, folder: Path) -> list[str]:
    """The part for the card, with what CMake would not find by itself."""
    arguments = ["-DGGML_CUDA=ON", "-DGGML_CUDA_NCCL=OFF", f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}"]
    arguments += [f"-DCMAKE_CUDA_ARCHITECTURES={cuda.card.architecture}"]
    beside = [cuda.toolkit / "lib64"]
    if cuda.cublas is not None:
        library = cuda.cublas.library
        light = library.with_name(library.name.replace("cublas", "cublasLt"))
        arguments += [f"-DCUDA_cublas_LIBRARY={library}", f"-DCUDA_cublasLt_LIBRARY={light}"]
        arguments += [f"-DCMAKE_CUDA_FLAGS=-I{_own_headers(cuda.cublas.headers, folder)}"]
        beside.append(library.parent)
    if cuda.driver is None:
        arguments.append("-DGGML_CUDA_NO_VMM=ON")  # the one part of it that needs libcuda when linking
    else:
        arguments.append(f"-DCUDA_cuda_driver_LIBRARY={cuda.driver}")
        beside.append(cuda.driver.parent)
    # The linker has to find what libggml-cuda needs in turn; so has the loader, but a stub must not be what it finds.
    links = ",".join(f"-rpath-link,{each}" for each in beside)
    loaded = ";".join(str(each) for each in beside if each.name != "stubs")
    return [*arguments, f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,{links}", f"-DCMAKE_BUILD_RPATH={loaded}"]


def _own_headers(headers: Path, folder: Path) -> Path:
    """The headers of cuBLAS alone: its package may have, beside them, those of another release of CUDA than nvcc's."""
    own = folder / "cublas"
    own.mkdir(parents=True, exist_ok=True)
    for header in headers.glob("cublas*.h"):
        (own / header.name).unlink(missing_ok=True)
        (own / header.name).symlink_to(header)
    return own


def parallel_jobs() -> str:
    """Every core, as far as there is memory for so many compilers."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return str(max(1, min(len(os.sched_getaffinity(0)), memory // _BYTES_OF_A_COMPILER)))


def install_bindings(options: Options) -> None:
    """The bindings' modules into the environment, with links to the libraries that were built.

    They load libggml from their own folder whatever LLAMA_CPP_LIB_PATH says; behind a link it is the same file as the
    one that the programs load.
    """
    package = site_packages(options) / "llama_cpp"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(options.work / SOURCES / "llama_cpp", package)
    (package / "lib").mkdir()
    for library in options.tools.glob("lib*.so"):
        (package / "lib" / library.name).symlink_to(library)
