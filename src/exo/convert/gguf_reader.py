"""Reads GGUF files, versions 2 and 3, whole or split. No length or offset in the file is trusted.

Format: the GGUF specification of ggml (docs/gguf.md). gguf-py's own reader makes an array for every string, which takes
8 s for a vocabulary of 262,144 tokens, and slices past the end of a file without noticing.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from exo.convert.cursor import Cursor
from exo.convert.fields import Fields, Value
from exo.convert.report import ConvertError
from exo.convert.tensor_data import Array, Bytes, can_decode, decode

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_DIMENSIONS = 4
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    """Outermost first, as Hugging Face has it; the file has the innermost first."""
    kind: gguf.GGMLQuantizationType
    rows: Bytes
    """[rows, bytes of a row]; a vector is one row."""


class GgufModel:
    """A model in one GGUF file or several; the metadata is the first file's. Raises ConvertError for a broken one."""

    def __init__(self, path: Path) -> None:
        parts = [_Part(part) for part in _parts(path)]
        self.fields = Fields(parts[0].metadata)
        self._tensors: dict[str, _Tensor] = {}
        for part in parts:
            for name, tensor in part.tensors():
                if name in self._tensors:
                    raise ConvertError(name, f"this tensor is in {path.name} more than once")
                self._tensors[name] = tensor
        declared = self.fields.optional_integer("split.tensors.count")
        if declared is not None and declared != len(self._tensors):
            raise ConvertError("split.tensors.count", f"is {declared}, but the files hold {len(self._tensors)} tensors")
        if self.fields.integer("split.count", 1, least=0) not in (0, len(parts)):
            raise ConvertError(path.name, "is one file of a split model, but not named like it: …-00001-of-00002.gguf")
        self.fields.ignore("split.no", "general.alignment")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def check_types(self) -> None:
        """Raises ConvertError naming the first tensor whose type gguf-py cannot dequantise."""
        for name, tensor in self._tensors.items():
            if not can_decode(tensor.kind):
                raise ConvertError(name, f"is stored as {tensor.kind.name}, which gguf-py cannot dequantise")

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a matrix as float32, [stop - start, columns]; a vector is one row."""
        tensor = self._tensors[name]
        return decode(tensor.rows[start:stop], tensor.kind)


class _Part:
    """One file: its metadata, and where its tensors lie."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = _map(path)
        cursor = Cursor(self._data, path.name)
        if cursor.take(4) != _MAGIC:
            raise ConvertError(path.name, "is not a GGUF file: it does not begin with GGUF")
        if (version := cursor.number("I")) not in _VERSIONS:
            raise ConvertError(path.name, f"is GGUF version {version:#x}; accepted: 2 and 3, little-endian")
        tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
        self.metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                raise ConvertError(key, f"this metadata key is in {path.name} more than once")
            self.metadata[key] = cursor.value(key)
        self._headers = [_header(cursor) for _ in range(tensor_count)]
        alignment = Fields(self.metadata).integer("general.alignment", _ALIGNMENT)
        self._start = -(-cursor.position // alignment) * alignment

    def tensors(self) -> Iterator[tuple[str, _Tensor]]:
        taken = 0
        for name, dimensions, number, offset in sorted(self._headers, key=lambda header: header[3]):
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError as error:
                raise ConvertError(name, f"has the unknown tensor type {number}") from error
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if dimensions[0] % block:
                raise ConvertError(
                    name, f"has rows of {dimensions[0]}, which blocks of {block} ({kind.name}) cannot fill"
                )
            row_bytes = dimensions[0] // block * size
            row_count = math.prod(dimensions[1:])
            start = self._start + offset
            end = start + row_bytes * row_count
            if offset < taken or end > len(self._data):
                raise ConvertError(name, f"lies at bytes {start} to {end}, outside its place in {self._path.name}")
            taken = offset + row_bytes * row_count
            yield name, _Tensor(tuple(reversed(dimensions)), kind, self._data[start:end].reshape(row_count, row_bytes))


def _header(cursor: Cursor) -> tuple[str, list[int], int, int]:
    """Name, dimensions, type number and offset of one tensor."""
    name = cursor.string("a tensor's name")
    count = cursor.number("I")
    if not 1 <= count <= _DIMENSIONS:
        raise ConvertError(name, f"has {count} dimensions, expected 1 to {_DIMENSIONS}")
    dimensions = [cursor.number("Q") for _ in range(count)]
    if 0 in dimensions:
        raise ConvertError(name, "has a dimension of 0")
    return name, dimensions, cursor.number("I"), cursor.number("Q")


def _map(path: Path) -> Bytes:
    if not path.is_file():
        raise ConvertError(str(path), "no such file; expected a .gguf file")
    if path.stat().st_size == 0:
        raise ConvertError(path.name, "is empty")
    # As a plain array, since each slice of a memmap costs several times that of an array.
    return np.asarray(np.memmap(path, np.uint8, "r"))


def _parts(path: Path) -> list[Path]:
    """Every file of the split model that ``path`` is one of, or ``path`` alone."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) == 0:
        return [path]
    return [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
