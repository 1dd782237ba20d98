"""Files and directories in a directory that a group shares, which its setgid bit shows."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path


def share(created: Path | int, directory: Path) -> None:
    """Gives the group the owner's permissions for a new file or folder in ``directory``, if a group shares that.

    The umask of most systems would deny that. Raises OSError.
    """
    if directory.stat().st_mode & (stat.S_ISGID | stat.S_IWGRP) == stat.S_ISGID | stat.S_IWGRP:
        mode = stat.S_IMODE(os.stat(created).st_mode)
        with suppress(PermissionError):  # another user has created it
            os.chmod(created, mode | (mode & stat.S_IRWXU) >> 3)


def make_directory(path: Path) -> None:
    """Creates a directory and those above it that are missing. Raises OSError."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir()
    except FileExistsError as error:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from error
    else:
        share(path, path.parent)
