"""Makes build/gpu-archive.tar.xz: what ``scripts/gpu_check`` needs on a machine that can fetch and compile nothing.

It holds the CUDA plug-in, llama.cpp's libraries, llama-server and llama-batched-bench, compiled here; the modules of
llama-cpp-python; and wheels of what the llama.cpp runner, the server, the benchmark and the contract tests import. exo
itself is not in it: the check runs from a checkout.
"""

import argparse
import importlib.util
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from exo.config import cache_directory
from exo.setup.cuda import compiled_plugin
from exo.setup.steps import SetupError, run, run_build, step
from exo.setup.toolkit import llama_source
from exo.worker.runner_cuda.plugin import DESCRIPTION, LIBRARY

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT / "build" / "gpu-archive.tar.xz"
LIMIT_MIB = 58
"""A machine that takes 64 MiB of files also gets the checkout, which has less than 6."""
PYTHON, ARCHITECTURES = "3.12", "90-real"

# Nothing that runs on llama.cpp alone imports these: MLX, and what tokenises and converts for it.
LEFT_OUT = {"mlx", "mlx-cpu", "mlx-lm", "transformers", "tokenizers", "sentencepiece", "protobuf", "regex", "hf-xet"}
TESTS = {"pytest", "pytest-xdist", "execnet", "iniconfig", "pluggy", "hypothesis", "sortedcontainers"}

TARGETS = ("llama", "llama-server", "llama-batched-bench")
SWITCHES = (
    # For the instruction sets of x86-64-v3, which processors beside such GPUs have.
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", "-DGGML_CCACHE=OFF", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "APP", "UI")),
)  # fmt: skip


def main() -> None:
    """Compiles and downloads what is missing, packs, says how large it is; fails beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=PYTHON, help=f"the version that the wheels are for; default {PYTHON}")
    parser.add_argument("--archs", default=ARCHITECTURES, help=f"GPUs, such as 89-real; default {ARCHITECTURES}")
    parser.add_argument("--output", type=Path, default=ARCHIVE)
    options = parser.parse_args()
    if not re.fullmatch(r"3\.1[1-9]", options.python):
        sys.exit(f"--python: must be like 3.12, at least 3.11 (got {options.python!r})")
    try:
        wheels = download_wheels(ROOT / "build" / "gpu-downloads", options.python)
        programs, plugin = compiled_programs(ROOT / "build" / "gpu-programs"), compiled_plugin(options.archs)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        count = pack(options.output, [*wheels, *modules(), *programs, *plugin_files(plugin)])
    except SetupError as error:
        sys.exit(str(error))
    size = options.output.stat().st_size / (1 << 20)
    print(f"{options.output}: {size:.1f} MiB, {count} files, for Python {options.python} and {options.archs}")
    if size >= LIMIT_MIB:
        sys.exit(f"the archive must have less than {LIMIT_MIB} MiB")


def pinned(name: str) -> dict[str, str]:
    """The pins of a requirements file by package, lower case; conditions on the platform are dropped."""
    lines = (line.split(";")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line.split("==")[0].lower(): line for line in lines if "==" in line and not line.startswith("#")}


def requirements() -> list[str]:
    """Returns the packages that the machine with the GPU needs, pinned as everywhere else, and this Python's pip."""
    runtime = [line for name, line in pinned("requirements.txt").items() if name not in LEFT_OUT]
    tests = [line for name, line in pinned("requirements-dev.txt").items() if name in TESTS]
    return sorted([*runtime, *tests, f"pip=={version('pip')}"])


Member = tuple[str, Path]
"""A name in the archive, and the file."""


def download_wheels(folder: Path, python: str) -> Iterator[Member]:
    """The wheels for a version of Python on x86-64 Linux with glibc 2.34 or newer. Raises SetupError."""
    wheels = folder / f"wheels-{python}"
    wheels.mkdir(parents=True, exist_ok=True)
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(34, 16, -1)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    target = ["--python-version", python, "--implementation", "cp", *platforms]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    run([*pip, "--only-binary=:all:", *target, "-d", wheels, *requirements()])
    pins = {normal(line) for line in requirements()}
    for wheel in wheels.glob("*.whl"):
        if normal("==".join(wheel.name.split("-")[:2])) in pins:
            yield f"wheels/{wheel.name}", wheel


def normal(pin: str) -> str:
    """A pin as it compares: package names are written in more than one way."""
    return re.sub(r"[-_.]+", "-", pin).lower()


def modules() -> Iterator[Member]:
    """The modules of this environment's bindings."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None, "make setup has installed them"
    assert spec.origin is not None
    for file in Path(spec.origin).parent.glob("*.py"):
        yield f"llama_cpp/{file.name}", file


def compiled_programs(folder: Path) -> Iterator[Member]:
    """llama.cpp's programs and libraries for the CPU, which load the plug-in. Raises SetupError."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise SetupError("there is no cmake in PATH (on Debian or Ubuntu: apt install cmake)")
    folder.mkdir(parents=True, exist_ok=True)
    source, log = llama_source(cache_directory() / "cuda"), folder / "build.log"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    with step(f"building llama-server and llama-batched-bench (minutes on two cores); log: {log}"):
        run_build([cmake, "-S", source, "-B", folder, *ninja, *SWITCHES], log, {})
        jobs = str(len(os.sched_getaffinity(0)))
        run_build([cmake, "--build", folder, "--parallel", jobs, "--target", *TARGETS], log, {})
    for file in (folder / "bin").iterdir():
        # A library by the name that the others look for: with its major version, if it has one.
        if (
            file.name in TARGETS
            or re.search(r"\.so\.\d+$", file.name)
            or (file.suffix == ".so" and not file.is_symlink())
        ):
            yield f"bin/{file.name}", file


def plugin_files(folder: Path) -> Iterator[Member]:
    for name in (LIBRARY, DESCRIPTION):
        yield f"plugin/{name}", folder / name


def pack(output: Path, members: Iterable[Member]) -> int:
    """Writes the archive; the same input gives the same bytes. Returns the number of files."""
    files = sorted(members)
    with tempfile.TemporaryDirectory() as folder:
        unfinished = output.with_suffix(".part")
        with tarfile.open(unfinished, "w:xz", preset=9) as archive:
            for name, file in files:
                smaller = prepared(file, Path(folder))
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = smaller.stat().st_size, 0o755 if name.startswith("bin/") else 0o644
                with smaller.open("rb") as content:
                    archive.addfile(entry, content)
        unfinished.rename(output)
    return len(files)


def prepared(file: Path, folder: Path) -> Path:
    """A copy that takes less room in the archive: a wheel without its own compression, a program without symbols."""
    with file.open("rb") as opened:
        start = opened.read(4)
    if file.suffix == ".whl":
        return stored(file, folder / file.name)
    if start == b"\x7fELF":
        run(["strip", "-o", folder / file.name, file])
        return folder / file.name
    return file


def stored(wheel: Path, target: Path) -> Path:
    """The wheel with its files not compressed one by one, so that xz finds what they have in common."""
    with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(target, "w") as written:
        for item in packed.infolist():
            entry = zipfile.ZipInfo(item.filename)
            entry.external_attr = item.external_attr
            written.writestr(entry, packed.read(item))
    return target


if __name__ == "__main__":
    main()
