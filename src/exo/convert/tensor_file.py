"""A file whose tensors have their places before their data comes, so that a model is never in memory as a whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from exo.convert.tensor_data import Bytes


class TensorFile:
    """Use it in a ``with`` statement, which ends with every tensor complete and the file on the disk, or raises."""

    def __init__(self, path: Path, places: Mapping[str, tuple[int, int]]) -> None:
        """``path`` exists and holds the header; ``places`` says where each tensor begins and ends, in bytes."""
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
