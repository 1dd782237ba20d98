"""Makes build/gpu-archive.tar.xz: what ``scripts/gpu_check`` needs on a machine that can fetch nothing.

It holds the pinned llama.cpp, trimmed to a CPU and CUDA build of its libraries, llama-bench, llama-batched-bench and
llama-server; llama-cpp-python's modules; and wheels of what the llama.cpp runner, the server, the benchmark and the
contract tests import. exo itself is not in it: the check runs from a checkout. Standard library only.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from exo.setup.llama import LLAMA  # noqa: E402

ARCHIVE = ROOT / "build" / "gpu-archive.tar.xz"
LIMIT_MIB = 60
PYTHONS = ("3.11", "3.12")

# Nothing that runs on llama.cpp alone imports these: MLX, and what tokenises and converts for it.
LEFT_OUT = {"mlx", "mlx-cpu", "mlx-lm", "transformers", "tokenizers", "sentencepiece", "protobuf", "regex", "hf-xet"}
TESTS = {"pytest", "iniconfig", "pluggy", "hypothesis", "sortedcontainers"}

VENDORED = PurePosixPath("vendor/llama.cpp")
KEPT_FOLDERS = {"cmake", "common", "ggml", "include", "licenses", "src", "tools", "vendor"}
KEPT_BACKENDS = {"ggml-cpu", "ggml-cuda"}
KEPT_FILES = {"CMakeLists.txt", "LICENSE", "scripts/ui-assets.cmake"}
KEPT_SUFFIXES = {".c", ".cpp", ".cu", ".cuh", ".cmake", ".h", ".hpp", ".in"}


def main() -> None:
    """Downloads what is missing, packs, says how large it is; fails beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", help=f"wheels for this version, repeatable; {', '.join(PYTHONS)}")
    parser.add_argument("--output", type=Path, default=ARCHIVE)
    parser.add_argument("--limit-mib", type=float, default=LIMIT_MIB)
    options = parser.parse_args()
    pythons = tuple(options.python or PYTHONS)
    for python in pythons:
        if not re.fullmatch(r"3\.1[1-9]", python):
            sys.exit(f"--python: must be like 3.12, at least 3.11 (got {python!r})")
    downloads = ROOT / "build" / "gpu-downloads"
    sources = download_sources(downloads)
    wheels = [download_wheels(downloads, python) for python in pythons]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    count = pack(options.output, sources, wheels)
    size = options.output.stat().st_size / (1 << 20)
    print(f"{options.output}: {size:.1f} MiB, {count} files, wheels for Python {' and '.join(pythons)}")
    if size >= options.limit_mib:
        sys.exit(
            f"the archive must have less than {options.limit_mib:g} MiB; with --python 3.12 alone it has fewer wheels"
        )


def pinned(name: str) -> dict[str, str]:
    """The pins of a requirements file by package, lower case; conditions on the platform are dropped."""
    lines = (line.split(";")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line.split("==")[0].lower(): line for line in lines if "==" in line and not line.startswith("#")}


def requirements() -> list[str]:
    """Returns the packages that the machine with the GPU needs, pinned as everywhere else, and this Python's pip."""
    runtime = [line for name, line in pinned("requirements.txt").items() if name not in LEFT_OUT]
    tests = [line for name, line in pinned("requirements-dev.txt").items() if name in TESTS]
    return sorted([*runtime, *tests, f"pip=={version('pip')}"])


def wanted(path: str) -> bool:
    """Whether a file of llama-cpp-python's source package, by its path in there, goes into the archive."""
    inside = PurePosixPath(path)
    if inside.parts[0] == "llama_cpp":
        return inside.suffix == ".py" and "server" not in inside.parts
    if path == "LICENSE.md":
        return True
    if not inside.is_relative_to(VENDORED):
        return False
    inside = inside.relative_to(VENDORED)
    if str(inside) in KEPT_FILES:
        return True
    if inside.parts[0] not in KEPT_FOLDERS:
        return False
    if inside.parts[:2] == ("tools", "ui"):
        return len(inside.parts) == 3 and (inside.suffix == ".in" or inside.name == "CMakeLists.txt")
    if inside.parts[:2] == ("ggml", "src") and len(inside.parts) > 3 and inside.parts[2] not in KEPT_BACKENDS:
        return False
    return inside.suffix in KEPT_SUFFIXES or inside.name in ("CMakeLists.txt", "LICENSE")


def download_sources(folder: Path) -> Path:
    """The source package of the pinned bindings."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = LLAMA.partition("==")
    file = folder / f"{name.replace('-', '_')}-{version}.tar.gz"
    if not file.exists():
        pip("download", "--no-deps", "--no-binary", name, "-d", folder, LLAMA)
    return file


def download_wheels(folder: Path, python: str) -> Path:
    """A folder with the wheels for a version of Python on x86-64 Linux with glibc 2.34 or newer."""
    wheels = folder / f"wheels-{python}"
    wheels.mkdir(parents=True, exist_ok=True)
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(34, 16, -1)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    target = ["--python-version", python, "--implementation", "cp", *platforms]
    pip("download", "--quiet", "--no-deps", "--only-binary=:all:", *target, "-d", wheels, *requirements())
    pins = {normal(line) for line in requirements()}
    for wheel in wheels.glob("*.whl"):
        if normal("==".join(wheel.name.split("-")[:2])) not in pins:
            wheel.unlink()  # of an earlier pin
    return wheels


def normal(pin: str) -> str:
    """A pin as it compares: package names are written in more than one way."""
    return re.sub(r"[-_.]+", "-", pin).lower()


def pip(*arguments: str | Path) -> None:
    """Runs this Python's pip; its failure ends this program."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def pack(output: Path, sources: Path, wheels: Iterable[Path]) -> int:
    """Writes the archive; the same input gives the same bytes. Returns the number of files."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted([*unpack_sources(sources, Path(folder)), *stored_wheels(wheels, Path(folder))])
        unfinished = output.with_suffix(".part")
        # The dictionary of this preset, 64 MiB, reaches from one version's NumPy to the next one's.
        with tarfile.open(unfinished, "w:xz", preset=9) as archive:
            for name in files:
                entry = tarfile.TarInfo(name)
                entry.size = (Path(folder) / name).stat().st_size
                with (Path(folder) / name).open("rb") as file:
                    archive.addfile(entry, file)
        unfinished.rename(output)
    return len(files)


def unpack_sources(sources: Path, folder: Path) -> Iterator[str]:
    """The wanted files of the source package, below ``llama-cpp-python/``; their names."""
    with tarfile.open(sources) as package:
        for member in package:
            inside = member.name.partition("/")[2]
            file = package.extractfile(member) if member.isfile() and wanted(inside) else None
            if file is not None:
                name = f"llama-cpp-python/{inside}"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(file.read())
                yield name


def stored_wheels(wheels: Iterable[Path], folder: Path) -> Iterator[str]:
    """The wheels, their files not compressed one by one, so that xz finds what they have in common; their names."""
    (folder / "wheels").mkdir()
    unlike = {wheel.name: wheel for each in wheels for wheel in sorted(each.glob("*.whl"))}
    for name, wheel in unlike.items():
        with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(folder / "wheels" / name, "w") as stored:
            for item in packed.infolist():
                entry = zipfile.ZipInfo(item.filename)
                entry.external_attr = item.external_attr
                stored.writestr(entry, packed.read(item))
        yield f"wheels/{name}"


if __name__ == "__main__":
    main()
