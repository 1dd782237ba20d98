"""``exo setup llama``: llama-cpp-python, compiled for this machine's processor with the options that exo needs."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from exo.config import cache_directory
from exo.setup.steps import SetupError, digest, pip_command, run, run_build, say, step
from exo.worker.runner_cuda.plugin import BINDINGS

LLAMA = f"llama-cpp-python=={BINDINGS}"
_ONLY_LLAMA = Path(__file__).with_name("only_llama.cmake")
# The file above builds what exo needs of the multimodal library. OpenMP's threads soon sleep while they wait for each
# other; llama.cpp's own threads spin, which starves them on a busy CPU.
_OPTIONS = ("-DLLAVA_BUILD=OFF", "-DGGML_OPENMP=ON")


def set_up_llama() -> str:
    """Compiles and installs the wheel, unless it is installed. Returns the new state. Raises SetupError."""
    key, stamp = _key(), Path(sys.prefix) / "llama.stamp"
    if not (stamp.exists() and stamp.read_text() == key and importlib.util.find_spec("llama_cpp")):
        wheel = llama_wheel()
        with step(f"installing {LLAMA}"):
            run([*pip_command(), "install", "--quiet", "--no-deps", "--force-reinstall", wheel])
            run([*pip_command(), "install", "--quiet", wheel])  # its dependencies, where they are missing
        stamp.write_text(key)
    return f"{LLAMA} is installed, compiled for this processor"


def llama_wheel() -> Path:
    """The wheel of the bindings, from the cache or compiled. Raises SetupError."""
    return cached_wheel(LLAMA, _key(), " ".join((*_OPTIONS, f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={_ONLY_LLAMA}")))


def _key() -> str:
    wanted = filter(None, [os.environ.get("CMAKE_ARGS")])
    return digest(LLAMA, processor_flags(), _ONLY_LLAMA.read_text(), *_OPTIONS, *wanted)


def processor_flags() -> str:
    """The processor's instruction sets, for which wheels are compiled."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


def cached_wheel(requirement: str, key: str, cmake: str) -> Path:
    """The wheel of ``requirement`` from the cache. Compiles it first if it is not there. Raises SetupError."""
    cache = cache_directory() / "wheels" / key
    if not any(cache.glob("*.whl")):
        _build_wheel(requirement, cmake, cache)
    return next(cache.glob("*.whl"))


def _build_wheel(requirement: str, cmake: str, cache: Path) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SetupError("llama.cpp needs a C++ compiler (on Debian or Ubuntu: apt install g++ cmake)")
    cache.mkdir(parents=True, exist_ok=True)
    log, jobs = cache / "build.log", str(os.cpu_count() or 1)
    say(f"building {requirement} (minutes on two cores); log: {log}")
    name = requirement.partition("==")[0]
    command = [*pip_command(), "wheel", "-v", "--no-deps", "--no-cache-dir", "--no-binary", name, "-w", cache]
    environment = {
        "CMAKE_BUILD_PARALLEL_LEVEL": jobs,
        "LLAMA_CPP_BUILD_JOBS": jobs,
        **os.environ,
        "CMAKE_ARGS": f"{cmake} {os.environ.get('CMAKE_ARGS', '')}",
    }
    run_build([*command, requirement], log, environment)
