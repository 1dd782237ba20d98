"""Reads the weights of a folder in Hugging Face's or MLX's layout. No length or offset in a header is trusted.

Format: the safetensors specification (README of the safetensors project): a header length, a JSON header, the data.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from exo.convert.json_file import read_json
from exo.convert.mlx_quantisation import Quantisation, Settings, dequantise, require_mlx
from exo.convert.report import ConvertError
from exo.convert.tensor_data import Array, Bytes, Kind, decode
from exo.worker.protocol.wire import describe

_LONGEST_HEADER = 100_000_000
"""The specification's limit."""
_KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
_PACKED = "U32"
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, _PACKED: 4}

_Count = Annotated[int, Field(ge=0, strict=True)]


class _Header(BaseModel):
    """One tensor's entry in the header."""

    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


class _Index(BaseModel):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


_HEADERS = TypeAdapter(dict[str, _Header | dict[str, str]])


@dataclass(frozen=True, slots=True)
class _Tensor:
    """As stored; ``rows`` is [rows, bytes of a row], a vector being one row."""

    shape: tuple[int, ...]
    dtype: str
    rows: Bytes


class SafetensorsModel:
    """The tensors of ``folder`` as a reader of the model sees them: a quantised matrix is one tensor of its full size.

    Raises ConvertError for a broken file, and for a number format that is not float32, float16, bfloat16 or MLX's own.
    """

    def __init__(self, folder: Path, quantisation: Quantisation | None) -> None:
        self._stored: dict[str, _Tensor] = {}
        for path in _files(folder):
            for name, tensor in _read(path).items():
                if name in self._stored:
                    raise ConvertError(name, f"this tensor is in {folder.name} more than once")
                self._stored[name] = tensor
        self._quantisation = quantisation
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._stored.items():
            if not self._belongs_to_packed(name):
                self._shapes[name] = self._full_shape(name, tensor)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a matrix as float32, [stop - start, columns]; a vector is one row."""
        tensor = self._stored[name]
        if tensor.dtype != _PACKED:
            return decode(tensor.rows[start:stop], _KINDS[tensor.dtype])
        scales, biases = (self._plain(_companion(name, kind), start, stop) for kind in ("scales", "biases"))
        packed = np.ascontiguousarray(tensor.rows[start:stop]).view(np.uint32)
        return dequantise(packed, scales, biases, self._settings_of(name))

    def _plain(self, name: str, start: int, stop: int) -> Array:
        tensor = self._stored[name]
        return decode(tensor.rows[start:stop], _KINDS[tensor.dtype])

    def _belongs_to_packed(self, name: str) -> bool:
        """Whether a tensor is the scales or biases of a quantised matrix."""
        module, _, kind = name.rpartition(".")
        weight = self._stored.get(f"{module}.weight")
        return kind in ("scales", "biases") and weight is not None and weight.dtype == _PACKED

    def _full_shape(self, name: str, tensor: _Tensor) -> tuple[int, ...]:
        if tensor.dtype in _KINDS:
            return tensor.shape
        if tensor.dtype != _PACKED:
            raise ConvertError(name, f"is stored as {tensor.dtype}; accepted: {', '.join(_KINDS)}, MLX's quantisation")
        settings = self._settings_of(name)
        columns = tensor.shape[-1] * 32 // settings.bits
        expected = (*tensor.shape[:-1], columns // settings.group_size)
        for companion in (_companion(name, "scales"), _companion(name, "biases")):
            found = self._stored.get(companion)
            if found is None or found.shape != expected or found.dtype not in _KINDS:
                raise ConvertError(companion, f"is missing or not of shape {expected}, which {name} needs")
        return (*tensor.shape[:-1], columns)

    def _settings_of(self, name: str) -> Settings:
        if self._quantisation is None:
            raise ConvertError(name, "is stored as U32, but config.json has no quantization")
        require_mlx()
        return self._quantisation.of_module(name.removesuffix(".weight"))


def _companion(weight: str, kind: str) -> str:
    return f"{weight.removesuffix('.weight')}.{kind}"


def _files(folder: Path) -> list[Path]:
    """The files that the index names or, without one, every ``model*.safetensors``, as mlx-lm has it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index, _Index).weight_map.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ConvertError(index.name, f"names {name!r}, which is no file of this folder")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ConvertError(str(folder), "has no model*.safetensors; weights in any other format are not read")
    return files


def _read(path: Path) -> dict[str, _Tensor]:
    size = path.stat().st_size
    file = np.asarray(np.memmap(path, np.uint8, "r")) if size else np.zeros(0, np.uint8)
    length = struct.unpack("<Q", file[:8].tobytes())[0] if size >= 8 else size
    if length > min(size - 8, _LONGEST_HEADER):
        raise ConvertError(path.name, f"is no safetensors file: a header of {length} bytes in a file of {size}")
    header, data = file[8 : 8 + length].tobytes(), file[8 + length :]
    tensors = _tensors(_entries(path, header), data)
    used = sum(tensor.rows.nbytes for tensor in tensors.values())
    if used != len(data):
        raise ConvertError(path.name, f"has {len(data)} bytes of data, but its tensors are {used}")
    return tensors


def _entries(path: Path, header: bytes) -> dict[str, _Header]:
    try:
        entries = _HEADERS.validate_json(header)
    except ValidationError as error:
        raise ConvertError(path.name, f"has a broken header: {describe(error)[1]}") from error
    entries.pop("__metadata__", None)
    found: dict[str, _Header] = {}
    for name, entry in entries.items():
        if not isinstance(entry, _Header):
            raise ConvertError(name, f"has no type, shape and place in {path.name}")
        found[name] = entry
    return found


def _tensors(headers: Mapping[str, _Header], data: Bytes) -> dict[str, _Tensor]:
    """Each tensor's place in ``data``, which they must fill without a gap."""
    tensors: dict[str, _Tensor] = {}
    position = 0
    for name, header in sorted(headers.items(), key=lambda item: item[1].data_offsets):
        if header.dtype not in _BYTES:
            raise ConvertError(name, f"is stored as {header.dtype}; accepted: {', '.join(_BYTES)}")
        begin, end = header.data_offsets
        if begin != position or end > len(data) or end - begin != math.prod(header.shape) * _BYTES[header.dtype]:
            raise ConvertError(name, f"lies at bytes {begin} to {end} of {len(data)}, which is not its place")
        if not 1 <= len(header.shape) <= 2 or 0 in header.shape:
            raise ConvertError(name, f"has shape {header.shape}, expected a vector or a matrix")
        position = end
        row_bytes = header.shape[-1] * _BYTES[header.dtype]
        tensors[name] = _Tensor(tuple(header.shape), header.dtype, data[begin:end].reshape(-1, row_bytes))
    return tensors
