"""Forces a growing file to the disk while it grows."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

_STRETCH = 64 << 20
"""Bytes that are written before the disk is asked to take them."""


class Writeback:
    """Hands a file to the disk a stretch at a time, in a thread of its own.

    Left to the end, a large file waits there for the disk, and before that the kernel slows the writer down, because
    too much of the memory waits to be written.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writeback")
        self._under_way: Future[None] | None = None
        self._written = 0

    def wrote(self, n_bytes: int) -> None:
        """So many more bytes were written. Raises OSError if the disk would not take those before."""
        self._written += n_bytes
        if self._written < _STRETCH or (self._under_way is not None and not self._under_way.done()):
            return
        self._settle()
        self._written = 0
        self._under_way = self._thread.submit(os.fdatasync, self._descriptor)

    def finish(self) -> None:
        """Waits until all of it is on the disk. Raises OSError."""
        self._settle()
        os.fsync(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def _settle(self) -> None:
        """The kernel tells of a failed write once: whoever asked has to hear of it."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None
