"""Packs the llama.cpp runner as the wheel ``exo-llama-cpp``: ``python scripts/runner_wheel.py FOLDER``.

It can be installed beside another package ``exo``, because nothing in it has that name at the top. With pip, making it
would need a copy of the tree, a second project file and the network.
"""

import base64
import hashlib
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).parents[1]
PARTS = (
    *("chat", "worker/protocol", "worker/runner_common", "worker/runner_cuda"),
    *("worker/router.py", "worker/host.py", "worker/speed.py", "cards/card.py"),
    *("__init__.py", "worker/__init__.py", "cards/__init__.py"),
)
"""The runner, what it imports, and what an adapter calls: templates, parsers and the router."""
REQUIRED = {"pydantic", "anyio", "jinja2", "llguidance", "psutil", "llama-cpp-python", "numpy"}


def files() -> Iterator[tuple[str, bytes]]:
    """The names in the wheel, and the contents."""
    package, source = ROOT / "integrations" / "exo_llama_cpp", ROOT / "src" / "exo"
    for path in sorted(package.glob("*.py")):
        yield f"exo_llama_cpp/{path.name}", path.read_bytes()
    for part in PARTS:
        for path in sorted((source / part).rglob("*.py")) or [source / part]:
            yield f"exo_llama_cpp/tree/exo/{path.relative_to(source)}", path.read_bytes()


def metadata(version: str, requirements: Iterable[str]) -> bytes:
    """The package's name, version and requirements."""
    needed = [each for each in requirements if re.split(r"[^\w.-]", each)[0] in REQUIRED]
    lines = ["Metadata-Version: 2.1", "Name: exo-llama-cpp", f"Version: {version}", "Requires-Python: >=3.11"]
    return "\n".join([*lines, *(f"Requires-Dist: {each}" for each in needed), ""]).encode()


def pack(folder: Path) -> Path:
    """Writes the wheel, the same bytes for the same files, and returns its path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["cuda"]]
    info = f"exo_llama_cpp-{version}.dist-info"
    contents = dict(files())
    contents[f"{info}/METADATA"] = metadata(version, requirements)
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: exo\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in contents.items()]
    contents[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"exo_llama_cpp-{version}-py3-none-any.whl"
    with ZipFile(path, "w", ZIP_DEFLATED) as wheel:
        for name, data in contents.items():
            entry = ZipInfo(name)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, data, ZIP_DEFLATED)
    return path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(pack(Path(sys.argv[1])))
