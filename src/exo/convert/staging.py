"""Writes a target that appears whole or not at all: it is built in a hidden folder next to its place and moved there.

A killed conversion leaves that folder behind; the next one to the same target clears it. A lock on the folder, which
the system drops with the process, keeps two conversions to one target apart.
"""

import fcntl
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from exo.convert.report import ConvertError, Format
from exo.convert.tensor_data import Bytes

_MARGIN = 64 << 20
"""Bytes for everything except the tensor data."""


@contextmanager
def staged(source: Path, target: Path, form: Format, *, overwrite: bool) -> Generator[Path]:
    """Yields the path to build the target at. A normal end of the ``with`` block puts the target in place.

    Raises ConvertError for a target that cannot be written, or that exists, unless ``overwrite``.
    """
    target = target.absolute()
    staging = target.with_name(f".{target.name}.partial")
    built, replaced = staging / "new", staging / "old"
    _check_name(source, target, form)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(staging, target)
    try:
        _put_back(replaced, target)
        _clear(staging)
        _check_free(target, form, overwrite=overwrite)
        yield built
        _check_free(target, form, overwrite=overwrite)
        if built.is_dir():
            _sync(built)
        if target.is_dir():
            target.rename(replaced)
        os.replace(built, target)
        _sync(target.parent)
    finally:
        _put_back(replaced, target)
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def require_space(target: Path, byte_count: int) -> None:
    """Raises ConvertError with both numbers if the disk has no room for ``byte_count`` bytes of tensor data."""
    needed, free = byte_count + _MARGIN, shutil.disk_usage(target.absolute().parent).free
    if free < needed:
        raise ConvertError(str(target), f"needs {_size(needed)} of disk, but {_size(free)} is free")


def _check_name(source: Path, target: Path, form: Format) -> None:
    if form == "gguf" and target.suffix != ".gguf":
        raise ConvertError(str(target), "expected a name ending in .gguf for the GGUF file")
    if form == "mlx" and target.suffix == ".gguf":
        raise ConvertError(str(target), "expected the name of a folder, as an MLX model is one")
    if source.resolve().is_relative_to(target.resolve()):
        raise ConvertError(str(target), "is or holds the source")


def _check_free(target: Path, form: Format, *, overwrite: bool) -> None:
    """Only a model may be replaced: overwriting must not remove a folder of something else."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConvertError(str(target), "exists already; give another name, or ask for it to be overwritten")
    is_model = target.is_file() if form == "gguf" else target.is_dir() and _is_model_folder(target)
    if target.is_symlink() or not is_model:
        raise ConvertError(str(target), "exists and is no such model; it is not overwritten")


def _is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file() or not any(folder.iterdir())


def _lock(staging: Path, target: Path) -> int:
    """The locked descriptor of the staging folder, which is created if absent."""
    while True:
        staging.mkdir(exist_ok=True)
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another conversion may have removed the folder between the two calls above.
            if os.path.samestat(os.fstat(descriptor), os.stat(staging)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConvertError(str(target), "another conversion is writing it") from error
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _put_back(replaced: Path, target: Path) -> None:
    """A folder cannot be replaced in one step. This undoes the first step if the second did not happen."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(byte_count: int) -> str:
    return f"{byte_count / 1e9:,.2f} GB"


class TensorFile:
    """A file whose tensors have their places before their data comes, so that no model is in memory as a whole.

    A ``with`` statement ends with every tensor complete and the file on the disk, or raises.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[int, int]]) -> None:
        """``path`` exists and holds the header; ``places`` are each tensor's first byte and the byte after its last."""
        self._file = path.open("r+b")
        self._next = {name: begin for name, (begin, _) in places.items()}
        self._end = {name: end for name, (_, end) in places.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._check_complete()
                self._file.truncate(max(self._end.values()))
                self._file.flush()
                os.fsync(self._file.fileno())

    def append(self, name: str, data: Bytes) -> None:
        begin = self._next[name]
        self._next[name] = begin + data.nbytes
        self._file.seek(begin)
        self._file.write(data.data)

    def _check_complete(self) -> None:
        for name, position in self._next.items():
            if position != self._end[name]:
                raise AssertionError(f"{name} ends at byte {position}, not at {self._end[name]}")
