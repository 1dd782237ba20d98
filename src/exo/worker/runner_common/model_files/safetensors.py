"""Reads the header of a safetensors file. This is the only reader: checks, estimates and conversion share it.

Format: the safetensors project's README. Eight bytes hold the header's length; the header is a JSON object; the
tensors' data follows without holes. No length or offset is used before it is checked against the file's size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, NonNegativeInt, TypeAdapter, ValidationError

from exo.worker.protocol.validation import describe
from exo.worker.runner_common.model_files.file_kind import incomplete, what_it_is
from exo.worker.runner_common.model_files.header_source import HeaderError, HeaderSource, LocalHeader, first_bytes

_HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the format's own library."""
_SIZES = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64 F64 C64"}
_BYTES = {name: size for size, names in _SIZES.items() for name in names.split()}
"""Bytes of an element, by the format's name of its type."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_OBJECT: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])
_ENTRIES = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor and its place in the file, in bytes. ``shape`` has the outermost dimension first."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def open_safetensors(path: Path) -> Mapping[str, SafetensorsTensor]:
    """Reads the header of a file on disk. Raises HeaderError and OSError."""
    return read_safetensors(LocalHeader(path))


def read_safetensors(source: HeaderSource) -> Mapping[str, SafetensorsTensor]:
    """The tensors by name, in the order of their data. The file may be longer than they are.

    Raises HeaderError for a file that is not what its header says, and what ``source`` raises.
    """
    kind = what_it_is(source.upto(min(64, source.size)))
    if kind is not None and "safetensors file" not in kind:
        raise HeaderError(f"is not a safetensors file: it is {kind}")
    length = int.from_bytes(first_bytes(source, 8, 8, "its length")[:8], "little") if source.size >= 8 else 0
    if not 0 < length <= _HEADER_LIMIT or 8 + length > source.size:
        raise HeaderError(f"is not a safetensors file: it claims a header of {length:,} bytes and has {source.size:,}")
    data = first_bytes(source, 8 + length, 8 + length, "its header")
    try:
        content = _OBJECT.validate_json(bytes(data[8 : 8 + length]))
        content.pop("__metadata__", None)
        entries = _ENTRIES.validate_python(content)
    except ValidationError as error:
        raise HeaderError(f"is not a safetensors file: its header is broken: {describe(error)[1]}") from None
    found: dict[str, SafetensorsTensor] = {}
    taken = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        width = _BYTES.get(entry.dtype)
        if begin != taken or width is None or end - begin != math.prod(entry.shape) * width:
            place = f"of shape {entry.shape} at bytes {begin} to {end}, and {taken} are taken"
            raise HeaderError(f"is not a safetensors file: {name} is {entry.dtype} {place}")
        found[name] = SafetensorsTensor(entry.dtype, entry.shape, 8 + length + begin, end - begin)
        taken = end
    if source.size < 8 + length + taken:
        raise HeaderError(incomplete(source.size, 8 + length + taken))
    return found
