"""A target that appears whole or not at all: it is built in a hidden folder beside its place and moved at the end.

A killed conversion leaves that folder behind; the next one to the same target clears it away. A lock on the folder,
which the system drops with the process, keeps two conversions to one target apart.
"""

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from exo.convert.report import ConvertError, Format

_MARGIN = 64 << 20
"""Bytes to keep free for everything but the tensor data."""


@contextmanager
def staged(source: Path, target: Path, form: Format, *, overwrite: bool) -> Generator[Path]:
    """Gives the path to build the target at; a normal end of the ``with`` block puts it in place.

    Raises ConvertError for a target that cannot be written, or that exists unless ``overwrite``.
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
    """Only a model may be replaced: overwriting must not take a folder of something else away."""
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
    """The locked descriptor of the staging folder, which is made if absent."""
    while True:
        staging.mkdir(exist_ok=True)
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have removed the folder between the two calls above.
            if os.path.samestat(os.fstat(descriptor), os.stat(staging)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConvertError(str(target), "another conversion is writing it") from error
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _put_back(replaced: Path, target: Path) -> None:
    """A folder cannot be replaced in one step; if the second step never came, the first is undone."""
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
