"""A model in GGUF files: its metadata by type, its tensors' rows, and a new file's header.

gguf-py's own reader takes 8 s for a vocabulary of 262,144 tokens and slices past the end of a file without noticing.
Its writer wants each tensor as a whole, so ``TensorFile`` writes the data.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from exo.convert.encoding import Stored, placed
from exo.convert.report import ConvertError
from exo.convert.staging import TensorFile
from exo.convert.tensor_data import Array, Kind, SourceTensor, can_decode, decode, map_file
from exo.worker.runner_common.model_files.gguf import GgufHeader, Value, open_gguf, split_parts
from exo.worker.runner_common.model_files.header_source import HeaderError

MetadataValue = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
Metadata = Mapping[str, MetadataValue]
LARGEST_INTEGER = (1 << 31) - 1


class MetadataReader:
    """Reads metadata by type and remembers which keys were read.

    Every getter raises ConvertError naming a key that has another type, or is missing without a default.
    """

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._header.fields

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        expected = f"a whole number from {least} to {LARGEST_INTEGER}"
        value = self._single(key, default, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST_INTEGER:
            raise _wrong(key, repr(value), expected)
        return value

    def optional_integer(self, key: str) -> int | None:
        """At least 0; None for an absent key."""
        return self.integer(key, least=0) if key in self else None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number as the shortest decimal that has this float32, so that 1e-6 comes back as 1e-6."""
        value = self._single(key, default, "a positive number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise _wrong(key, repr(value), "a positive number")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        value = self._single(key, default, "true or false")
        if not isinstance(value, bool):
            raise _wrong(key, repr(value), "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._single(key, default, "a string")
        if not isinstance(value, str):
            raise _wrong(key, repr(value), "a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._value(key)
        if not isinstance(value, list):
            raise _wrong(key, f"an array of {len(value)}" if isinstance(value, tuple) else repr(value), "strings")
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """Exactly ``count`` numbers."""
        expected, found = f"an array of {count} numbers", self._header.array_length(key)
        if key in self and found != count:
            raise _wrong(key, f"an array of {found}", expected)
        value = self._value(key)
        if not isinstance(value, tuple):
            raise _wrong(key, repr(value), expected)
        return [float(each) for each in value]

    def expect(self, key: str, *accepted: Value) -> None:
        """Accepts these values and an absent key."""
        if key not in self:
            return
        expected = f"{' or '.join(repr(each) for each in accepted)}, the only one that can be converted"
        value = self._single(key, None, expected)
        if value not in accepted:
            raise _wrong(key, repr(value), expected)

    def ignore(self, *keys: str) -> None:
        """Marks keys as read whose values the other format need not know."""
        self._read.update(keys)

    def unread(self) -> Sequence[str]:
        return sorted(self._header.fields.keys() - self._read)

    def _single(self, key: str, default: Value | None, expected: str) -> Value:
        if key not in self and default is not None:
            return default
        # Refused before it is decoded, because it may be large.
        if key in self and self._header.fields[key].count is not None:
            raise _wrong(key, f"an array of {self._header.array_length(key)}", expected)
        return self._value(key)

    def _value(self, key: str) -> Value:
        self._read.add(key)
        try:
            value = self._header.value(key)
        except HeaderError as error:
            raise ConvertError(key, f"the file {error}") from error
        if value is None:
            raise ConvertError(key, "this metadata key is missing")
        return value


def _wrong(key: str, shown: str, expected: str) -> ConvertError:
    return ConvertError(key, f"is {shown[:100]}, expected {expected}")


class GgufModel:
    """A model in one GGUF file or several; the metadata is the first file's. Raises ConvertError for a broken one."""

    def __init__(self, path: Path) -> None:
        parts = split_parts(path)
        headers = [_header(part) for part in parts]
        self.metadata = MetadataReader(headers[0])
        self._tensors: dict[str, SourceTensor] = {}
        for part, header in zip(parts, headers, strict=True):
            data = map_file(part)
            for tensor in header.tensors:
                if tensor.name in self._tensors:
                    raise ConvertError(tensor.name, f"this tensor is in {path.name} more than once")
                rows = data[tensor.start : tensor.start + tensor.size].reshape(math.prod(tensor.shape[1:]), -1)
                shape, dtype = tuple(reversed(tensor.shape)), Kind(tensor.kind).name
                self._tensors[tensor.name] = SourceTensor(shape, dtype, rows)
        declared = self.metadata.optional_integer("split.tensors.count")
        if declared is not None and declared != len(self._tensors):
            raise ConvertError("split.tensors.count", f"is {declared}, but the files hold {len(self._tensors)} tensors")
        if self.metadata.integer("split.count", 1, least=0) not in (0, len(parts)):
            raise ConvertError(path.name, "is one file of a split model, but not named like it: …-00001-of-00002.gguf")
        self.metadata.ignore("split.no", "general.alignment")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def check_types(self) -> None:
        """Raises ConvertError naming the first tensor whose type gguf-py cannot dequantise."""
        for name, tensor in self._tensors.items():
            if not can_decode(Kind[tensor.dtype]):
                raise ConvertError(name, f"is stored as {tensor.dtype}, which gguf-py cannot dequantise")

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a matrix as float32, [stop - start, columns]; a vector is one row."""
        tensor = self._tensors[name]
        return decode(tensor.rows[start:stop], Kind[tensor.dtype])


def _header(path: Path) -> GgufHeader:
    if not path.is_file():
        raise ConvertError(str(path), "no such file; expected a .gguf file")
    try:
        return open_gguf(path)
    except HeaderError as error:
        raise ConvertError(path.name, str(error)) from error


def add_value(writer: gguf.GGUFWriter, key: str, value: MetadataValue) -> None:
    """Adds a metadata key. Whole numbers are stored as uint32, others as float32."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def create_gguf(path: Path, architecture: str, metadata: Metadata, tensors: Sequence[Stored]) -> TensorFile:
    """Writes the header and returns the file for the data. Whole numbers are stored as uint32, others as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for tensor in tensors:
        # raw_dtype decides the type, but an array type of uint8 would be taken for packed rows.
        float32 = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.byte_count, raw_dtype=Kind[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)
    return TensorFile(path, placed(tensors, start, writer.data_alignment))
