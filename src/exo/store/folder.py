"""A repository's folder in a models directory, and the manifest of the files that were pulled into it.

    <models>/<owner>--<name>/<file, as in the repository>     complete files, their hashes verified
    <models>/<owner>--<name>/.exo/manifest.json               their hashes, commits and dates
    <models>/<owner>--<name>/.exo/<name and hash, hashed>     a part: a file that is being pulled
    <models>/.locks/<owner>--<name>                           the lock for changes to the folder

A part's name depends on the content it will have, so a part is never continued with another revision's content.
"""

import hashlib
import os
import stat
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exo.store.errors import PullError
from exo.store.sharing import make_directory, share

OWN = ".exo"
_NAME_BYTES, _PATH_BYTES = 255, 1024
"""The longest path segment of common file systems, and the longest path that is accepted."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a repository. The hub chose its name, so it is not safe to use as a path."""

    name: str
    size: int
    etag: str
    """The SHA-256 of the content (64 digits), or the git blob id (40) of a small file that is in git itself."""


class PulledFile(BaseModel):
    """A file in a manifest. ``sha256`` and ``pulled_at`` are unknown until the file is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=0)]
    etag: str
    """The same as in ``RemoteFile``."""
    sha256: str | None = None
    revision: str
    """The commit of the last pull."""
    pulled_at: datetime | None = None


class Manifest(BaseModel):
    """The files of a folder. A name is in both tables while its newer content is being pulled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    repo: str
    files: Mapping[str, PulledFile] = {}
    """Complete and verified."""
    pending: Mapping[str, PulledFile] = {}
    """Being pulled, or left over from a pull that ended early."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The folder of ``repo`` in a models directory. It need not exist."""

    directory: Path
    repo: str

    @property
    def path(self) -> Path:
        """Where the runners look for the repository's files."""
        return self.directory / folder_name(self.repo)

    def manifest(self) -> Manifest:
        """The manifest, empty if there is none. Raises PullError for a manifest that cannot be read."""
        try:
            return Manifest.model_validate_json((self.path / OWN / "manifest.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return Manifest(repo=self.repo)
        except OSError as error:
            raise store_error(self.path, error) from error
        except ValidationError as error:
            broken = self.path / OWN / "manifest.json"
            raise PullError("store", f"{broken} is not a manifest of exo's; remove it and pull again") from error

    def write(self, manifest: Manifest) -> None:
        """Replaces the manifest atomically."""
        own = self.make(OWN)
        fresh = own / "manifest.json.new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "wb") as file:
            share(file.fileno(), own)
            file.write(manifest.model_dump_json(indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(own / "manifest.json")
        sync(own)

    def part(self, name: str, etag: str) -> Path:
        """The path of a file's part."""
        return self.path / OWN / hashlib.sha256(f"{name}\n{etag}".encode()).hexdigest()[:32]

    def part_size(self, name: str, entry: PulledFile | RemoteFile) -> int:
        """The size of a file's part in bytes; 0 if there is none."""
        return size_of(self.part(name, entry.etag)) or 0

    def holds(self, manifest: Manifest, file: RemoteFile) -> bool:
        """Whether the file is complete and has this content, judged by the manifest and its size."""
        entry = manifest.files.get(file.name)
        return entry is not None and entry.etag == file.etag and size_of(self.path / file.name) == file.size

    def make(self, inside: str = ".") -> Path:
        """Makes a directory inside the folder. Raises PullError if a link would lead out of the folder.

        The folder itself may be a link: its owner has put the model elsewhere.
        """
        try:
            make_directory(self.directory)
            path = self.directory
            for part in (self.path.name, *PurePosixPath(inside).parts):
                path /= part
                with suppress(FileExistsError):
                    path.mkdir()
                    share(path, path.parent)
                found = path.stat() if path == self.path else path.lstat()
                if not stat.S_ISDIR(found.st_mode):
                    raise PullError("store", f"{path} is not a directory, or a link to one, and is not written through")
        except OSError as error:
            raise store_error(self.path, error) from error
        return path

    def put(self, name: str, etag: str) -> None:
        """Gives a part, which must be complete and verified, its final name."""
        check_name(name)
        target = self.make(str(PurePosixPath(name).parent)) / PurePosixPath(name).name
        self.part(name, etag).replace(target)
        sync(target.parent)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files and the directories that this leaves empty."""
        for name in names:
            check_name(name)
            target = self.path / name
            if not target.parent.resolve().is_relative_to(self.path.resolve()):
                raise PullError("store", f"{target.parent} is a link that leads elsewhere; nothing is deleted there")
            target.unlink(missing_ok=True)
            for parent in PurePosixPath(name).parents[:-1]:
                _remove_if_empty(self.path / parent)

    def delete_own(self) -> None:
        """Deletes the manifest and all parts, and the folder if that leaves it empty."""
        own = self.path / OWN
        if own.is_symlink():
            raise PullError("store", f"{own} is a link; nothing is deleted there")
        for path in own.iterdir() if own.is_dir() else ():
            path.unlink()
        _remove_if_empty(own)
        _remove_if_empty(self.path)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Locks the folder against other processes. Raises PullError, with code ``busy`` if one of them has it."""
        locks = self.directory / ".locks"
        try:
            make_directory(locks)
            if locks.is_symlink():
                raise PullError("store", f"{locks} is a link, and is not written through")
            lock = FileLock(locks / self.path.name, timeout=0)
            lock.acquire()  # the system releases it with the process, however that ends
            share(locks / self.path.name, locks)
        except Timeout as error:
            raise PullError("busy", f"{self.repo} is being pulled by another process") from error
        except OSError as error:
            raise store_error(locks, error) from error
        try:
            yield
        finally:
            lock.release()


def folder_name(repo: str) -> str:
    """The folder in which upstream and the runners look for a repository."""
    return repo.replace("/", "--")


def check_name(name: str) -> None:
    """Raises PullError for a file name that could leave its folder on some file system."""
    parts = name.split("/")
    reason = None
    if not name.isprintable() or "\\" in name or _bytes(name) > _PATH_BYTES:
        reason = "it is too long, or contains characters that do not belong in a file name"
    elif any(part in ("", ".", "..") for part in parts):
        reason = "it leads out of its folder or has an empty segment"
    elif any(_bytes(part) > _NAME_BYTES for part in parts):
        reason = f"a segment of it is longer than {_NAME_BYTES} bytes"
    elif parts[0].lower() == OWN:
        reason = f"{OWN} is reserved for exo"
    if reason is not None:
        raise PullError("unsafe_name", f"the hub lists a file named {ascii(name)[:100]}, which is refused: {reason}")


def store_error(path: Path, error: OSError) -> PullError:
    """The error of a file system operation as a PullError."""
    return PullError("store", f"{error.filename or path}: {error.strerror or error}")


def size_of(path: Path) -> int | None:
    """The size of a file in bytes, links followed; None if there is no regular file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def sync(directory: Path) -> None:
    """Makes renames in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()
