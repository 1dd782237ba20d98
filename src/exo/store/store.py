"""The models directories as one store: finds models, chooses where to pull to, and removes models."""

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from exo.store.errors import PullError
from exo.store.file_selection import Source, file_sets, projectors
from exo.store.folder import Manifest, ModelFolder, PulledFile, RemoteFile, folder_name, size_of
from exo.worker.runner_common.model_files.folder_weights import INDEX, names_in_index
from exo.worker.runner_common.model_files.gguf import split_parts

_EMPTY = Manifest(repo="")


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A model on disk, as a runner would find it. Sizes are in bytes."""

    state: Literal["present", "partial", "absent"]
    bytes: int = 0
    total: int | None = None
    """The size when complete; None if unknown, as for files that exo did not pull."""
    path: Path | None = None
    """The path that the runner loads: a GGUF file, the first part of a split one, or a folder."""
    revision: str | None = None
    """The commit, if known."""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """The files that were deleted, and their size."""

    files: tuple[Path, ...]
    bytes: int


class Store:
    """``directories`` are searched in order. Those that are also in ``read_only`` are never written to."""

    def __init__(self, directories: Sequence[Path], read_only: Collection[Path] = ()) -> None:
        self.directories = tuple(directories)
        self.read_only = frozenset(read_only)

    @property
    def writable(self) -> tuple[Path, ...]:
        """The directories a pull may write to, in order of preference."""
        return tuple(directory for directory in self.directories if directory not in self.read_only)

    def on_disk(self, source: Source) -> OnDisk:
        """Looks for the files where the runner would. Reads names and sizes only."""
        found = OnDisk("absent")
        for directory, path, inside in self._places(source):
            here = self._look(directory, path, inside)
            if here.state == "present":
                return here
            if found.state == "absent":
                found = here
        return found

    def holder(self, repo: str, files: Collection[RemoteFile]) -> ModelFolder | None:
        """The folder that has these files. In a read-only directory without a manifest, equal sizes are enough."""
        for directory in self.directories:
            folder = ModelFolder(directory, repo)
            manifest = _manifest(folder)
            if all(folder.holds(manifest, file) for file in files):
                return folder
            unrecorded = directory in self.read_only and not manifest.files
            if unrecorded and all(size_of(folder.path / file.name) == file.size for file in files):
                return folder
        return None

    def place(self, repo: str, files: Collection[RemoteFile]) -> ModelFolder:
        """The folder to pull these files to: one that has the repository already, else the first with enough room.

        Raises PullError if none has; its message gives the bytes needed and free.
        """
        if not self.writable:
            raise PullError("read_only", "every models directory is read-only; set EXO_DEFAULT_MODELS_DIR to another")
        folders = [ModelFolder(directory, repo) for directory in self.writable]
        short: list[str] = []
        for folder in [folder for folder in folders if _manifest(folder) != Manifest(repo=repo)] or folders:
            needed, free = _needed(folder, files), _free(folder.directory)
            if needed <= free:
                return folder
            short.append(f"{folder.directory} has {free:,} bytes free, {needed:,} are needed")
        raise PullError("disk_full", f"no room for {repo}: {'; '.join(short)}")

    def remove(self, source: Source) -> Removed:
        """Deletes the files and parts that were pulled for a source, and nothing else. Raises PullError."""
        repo, deleted, size = source.required_repo(), list[Path](), 0
        for directory in self.writable:
            folder = ModelFolder(directory, repo)
            manifest = folder.manifest()
            if _chosen(source, manifest.files.keys() | manifest.pending.keys(), _indexed(folder.path)):
                with folder.locked():
                    size += _remove(folder, source, deleted)
        if deleted:
            return Removed(tuple(deleted), size)
        left = self.on_disk(source)
        if left.state == "absent":
            raise PullError("not_found", f"{source.model_id} is not on disk for {source.runner}")
        if left.read_only:
            raise PullError("read_only", f"{left.path} is in a read-only directory, and stays")
        raise PullError("not_found", f"{left.path} was not pulled by exo, so it stays; delete it yourself")

    def _places(self, source: Source) -> Iterator[tuple[Path, Path, Source]]:
        """Models directory, folder in it and source to look for there, in the order in which runners look."""
        path = Path(source.path).expanduser() if source.path else None
        if path is not None and path.is_absolute():
            gguf = source.runner == "cuda"
            yield path.parent, path.parent if gguf else path, replace(source, path=path.name)
            return
        ids = [folder_name(name) for name in (source.model_id, source.repo) if name]
        if source.runner == "cuda":
            folders = [*ids, "."]
        else:
            folders = [str(path), f"{ids[0]}/{path}"] if path is not None else ids[-1:]
        for directory in self.directories:
            for folder in folders:
                yield directory, Path(os.path.normpath(directory / folder)), source

    def _look(self, directory: Path, path: Path, source: Source) -> OnDisk:
        folder = ModelFolder(directory, source.repo) if source.repo else None
        manifest = _manifest(folder) if folder is not None and folder.path == path else _EMPTY
        sizes = _whole(path, source, manifest)
        read_only = directory in self.read_only
        indexed = _indexed(path)
        for files in file_sets(source, sizes, indexed):
            names = {*files.names, *projectors(source, sizes)}
            whole = not files.missing and bool(projectors(source, names)) == bool(source.mmproj)
            recorded: set[str] = set() if source.runner == "cuda" else set(_chosen(source, manifest.files, indexed))
            if whole and recorded <= names:
                loaded = path / files.names[0] if source.runner == "cuda" else path
                held, entry = sum(sizes[name] for name in names), manifest.files.get(files.names[0])
                return OnDisk("present", held, held, loaded, entry and entry.revision, read_only)
        begun = {**manifest.files, **manifest.pending}
        if (known := _chosen(source, begun, indexed)) and folder is not None:
            parts = {name: folder.part_size(name, entry) for name, entry in manifest.pending.items()}
            held = sum(sizes.get(name, parts.get(name, 0)) for name in known)
            total, revision = sum(begun[name].size for name in known), begun[known[0]].revision
            return OnDisk("partial", held, total, path, revision, read_only)
        there = [name for files in file_sets(source, sizes, indexed) for name in files.names]
        return OnDisk("partial", sum(sizes[name] for name in there), None, path) if there else OnDisk("absent")


def _manifest(folder: ModelFolder) -> Manifest:
    """The manifest, for reading only: a broken one counts as empty. Writers use ``folder.manifest``, which raises."""
    with suppress(PullError):
        return folder.manifest()
    return _EMPTY


def _indexed(path: Path) -> frozenset[str] | None:
    """The names in the index of weights of a folder on disk; None without a sound one."""
    with suppress(OSError, ValueError):
        return names_in_index((path / INDEX).read_bytes())
    return None


def _chosen(source: Source, names: Collection[str], indexed: Collection[str] | None) -> tuple[str, ...]:
    """The names of a manifest that belong to the source."""
    chosen = [name for files in file_sets(source, names, indexed) for name in files.names]
    return (*chosen, *projectors(source, names)) if chosen else ()


def _whole(path: Path, source: Source, manifest: Manifest) -> dict[str, int]:
    """Sizes of complete files: as long as the manifest records, or not in it because the user put them there."""
    inside = PurePosixPath(source.path or source.file or "").parent if source.runner == "cuda" else PurePosixPath()
    names = set(manifest.files)
    if source.path is not None and source.runner == "cuda" and source.mmproj is None:
        # Only the parts of this file are looked for: its folder may hold thousands of other files.
        names |= {str(inside / part.name) for part in split_parts(Path(source.path))} - manifest.pending.keys()
    else:
        with suppress(OSError):
            names |= {str(inside / name) for name in os.listdir(path / inside)} - manifest.pending.keys()
    sizes = {name: size_of(path / name) for name in names}
    expected = {name: entry.size for name, entry in manifest.files.items()}
    return {name: size for name, size in sizes.items() if size is not None and expected.get(name, size) == size}


def _remove(folder: ModelFolder, source: Source, deleted: list[Path]) -> int:
    manifest = folder.manifest()
    names = _chosen(source, manifest.files.keys() | manifest.pending.keys(), _indexed(folder.path))
    size = sum(size_of(folder.path / name) or 0 for name in names)
    deleted += [folder.path / name for name in names]
    for name, entry in manifest.pending.items():
        if name in names:
            size += folder.part_size(name, entry)
            folder.part(name, entry.etag).unlink(missing_ok=True)
    folder.delete(names)
    files, pending = _without(manifest.files.items(), names), _without(manifest.pending.items(), names)
    if files or pending:
        folder.write(manifest.model_copy(update={"files": files, "pending": pending}))
    else:
        folder.delete_own()
    return size


def _without(entries: Collection[tuple[str, PulledFile]], names: Collection[str]) -> dict[str, PulledFile]:
    return {name: entry for name, entry in entries if name not in names}


def _needed(folder: ModelFolder, files: Collection[RemoteFile]) -> int:
    """Bytes still to be pulled. An unrecorded file of the right size counts as present; its hash is checked later."""
    manifest = _manifest(folder)
    there = {file.name for file in files if folder.holds(manifest, file)}
    there |= {
        file.name for file in files if file.name not in manifest.files and size_of(folder.path / file.name) == file.size
    }
    return sum(file.size - folder.part_size(file.name, file) for file in files if file.name not in there)


def _free(directory: Path) -> int:
    """Free bytes on the file system where the directory is, or will be, as far as it can be reached."""
    existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    return shutil.disk_usage(existing).free
