"""Reads the header of a GGUF file. This is the only reader: inspection, checks, estimates and conversion share it.

Format: ggml's GGUF specification (docs/gguf.md), versions 2 and 3, little-endian. The file may be hostile: no count,
length or offset in it is used before it is checked against the file's size and the limits below. Reading follows the
lengths only; a value is decoded when it is asked for, because most of a header is a vocabulary that few callers need.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from exo.worker.runner_common.model_files.file_kind import incomplete, what_it_is
from exo.worker.runner_common.model_files.header_source import HeaderError, HeaderSource, LocalHeader, first_bytes

HEADER_LIMIT = 512 << 20
"""Bytes before the tensors' data; a vocabulary of 262,144 tokens takes about 15 MB."""
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 20
_LONGEST_KEY = (1 << 16) - 1
_LONGEST_TENSOR_NAME = 63
_LONGEST_TEXT = 1 << 20
_MOST_ELEMENTS = 1 << 24

_LARGEST_FILE = 1 << 46
"""Bytes; a header that claims more is broken, and not that of a file of which something is missing."""

_VERSIONS = (2, 3)
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's code of each of the specification's value types that has a fixed size."""
_WHOLE = frozenset(_NUMBERS) - {6, 12}
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_ARCHITECTURE = re.compile(r"[a-z0-9_-]{1,64}")
_PART = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf")

_BLOCKS = {
    1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
    32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 20: 18, 39: 17},
    64: {40: 36},
    128: {41: 18},
    256: {10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 16: 66, 17: 74, 18: 98, 19: 50, 21: 110, 22: 82, 23: 136}
    | {29: 56, 34: 54, 35: 66},
}
TENSOR_TYPES = {kind: (block, size) for block, sizes in _BLOCKS.items() for kind, size in sizes.items()}
"""Elements and bytes of a block, by the number of ggml's tensor type."""

Value = bool | int | float | str | list[str] | tuple[bool | int | float, ...]
"""An array of strings is a list, an array of numbers a tuple."""


@dataclass(frozen=True, slots=True)
class GgufField:
    """Where a metadata value is. ``kind`` is the type of the value, or of an array's elements."""

    kind: int
    count: int | None
    """None for a single value."""
    at: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor and its place in the file. ``kind`` is the number of its type in ggml; sizes are in bytes."""

    name: str
    shape: tuple[int, ...]
    """Innermost dimension first."""
    kind: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata and the tensors of one file. Methods raise HeaderError for a value that cannot be decoded."""

    fields: Mapping[str, GgufField]
    tensors: tuple[GgufTensor, ...]
    data: bytes | bytearray
    """The file's beginning, with all metadata."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, with which the names of the model's own keys begin."""
        name = self.text("general.architecture")
        if not _ARCHITECTURE.fullmatch(name):
            raise HeaderError(f"has general.architecture = {ascii(name)[:100]}, which is no architecture's name")
        return name

    def value(self, key: str, most: int = _MOST_ELEMENTS) -> Value | None:
        """A value of any type; None for an absent key. An array may have up to ``most`` elements."""
        if (field := self.fields.get(key)) is None:
            return None
        if (count := field.count) is not None and count > most:
            raise HeaderError(f"has {ascii(key)[:100]} with {count:,} elements, expected at most {most:,}")
        if field.kind == STRING:
            texts = self.strings(key)
            if count is None and len(texts[0]) > _LONGEST_TEXT:
                raise HeaderError(f"has {key} of {len(texts[0]):,} bytes, expected at most {_LONGEST_TEXT:,}")
            try:
                decoded = [text.decode() for text in texts]
            except UnicodeDecodeError:
                raise HeaderError(f"has {ascii(key)[:100]} that is not UTF-8") from None
            return decoded[0] if count is None else decoded
        numbers = struct.unpack_from(f"<{1 if count is None else count}{_NUMBERS[field.kind]}", self.data, field.at)
        return numbers[0] if count is None else numbers

    def strings(self, key: str) -> list[bytes]:
        """The bytes of a string or of an array's strings, which need not be UTF-8. The key must be there."""
        found, field, length_at = list[bytes](), self.fields[key], struct.Struct("<Q").unpack_from
        at = field.at
        for _ in range(1 if field.count is None else field.count):
            start = at + 8
            at = start + length_at(self.data, at)[0]
            found.append(bytes(self.data[start:at]))
        return found

    def text(self, key: str) -> str:
        """A string; empty for an absent key."""
        value = self.value(key, most=0)
        if not isinstance(value, str | None):
            raise HeaderError(f"has {key} = {ascii(value)[:100]}, expected a string")
        return value or ""

    def integer(self, key: str, default: int) -> int:
        """A whole number or a flag; ``default`` for an absent key and for any other type."""
        field = self.fields.get(key)
        value = self.value(key) if field is not None and field.count is None and field.kind != STRING else None
        return int(value) if isinstance(value, int) else default

    def per_layer(self, key: str, n_layers: int, default: int) -> list[int]:
        """A whole number for each layer; a file may give one number for all."""
        field = self.fields.get(key)
        if field is not None and field.count is not None and field.count >= n_layers and field.kind in _WHOLE:
            values = struct.unpack_from(f"<{n_layers}{_NUMBERS[field.kind]}", self.data, field.at)
            return [int(each) for each in values]
        return [self.integer(key, default)] * n_layers

    def array_length(self, key: str) -> int:
        """The number of an array's elements; 0 for an absent key and for a single value."""
        return (self.fields[key].count or 0) if key in self.fields else 0


def quality_notes(text: Callable[[str], str | None]) -> tuple[str, ...]:
    """Faults of a model's metadata with which it works, but worse than it could. ``text`` gives a key's value."""
    if text("tokenizer.ggml.model") == "gpt2" and not text("tokenizer.ggml.pre"):
        fault = (
            "the GGUF file does not name its pre-tokenizer, so text is split by a default that may not be the model's"
        )
        return (f"{fault}, and the output is worse than it could be: get a newer conversion of the model",)
    return ()


def split_parts(path: Path) -> list[Path]:
    """Every file of the split model that ``path`` is one of, by the names that llama.cpp looks for, or ``path``."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match[2]) == 0:
        return [path]
    return [path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf") for number in range(1, int(match[2]) + 1)]


def open_gguf(path: Path) -> GgufHeader:
    """Reads the whole header of a file on disk. Raises HeaderError and OSError."""
    return read_gguf(LocalHeader(path))


def read_gguf(
    source: HeaderSource, *, limit: int = HEADER_LIMIT, tensors: bool = True, before: str | None = None
) -> GgufHeader:
    """Follows a header to its end, or without ``tensors`` to the end of the metadata.

    With ``before``, ends ahead of the first key that begins with it; nothing behind that is read or checked.
    Raises HeaderError for a header that is broken or longer than ``limit`` bytes, and what ``source`` raises.
    """
    cursor = _Cursor(source, limit)
    at = cursor.advance(4)
    if (magic := bytes(cursor.data[at : at + 4])) != b"GGUF":
        kind = what_it_is(source.upto(min(64, source.size)))
        raise HeaderError(f"is not a GGUF file: it {f'is {kind}' if kind else f'begins with {magic!r}'}")
    if (version := cursor.number("I")) not in _VERSIONS:
        raise HeaderError(f"is GGUF version {version:#x}; accepted are 2 and 3, little-endian")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    if n_keys > _MOST_KEYS or n_tensors > _MOST_TENSORS:
        raise HeaderError(
            f"claims {n_keys} keys and {n_tensors} tensors, expected at most {_MOST_KEYS} and {_MOST_TENSORS}"
        )
    fields: dict[str, GgufField] = {}
    for number in range(n_keys):
        cursor.what = f"metadata key {number}"
        key = cursor.name("a metadata key", _LONGEST_KEY)
        if key in fields:
            raise HeaderError(f"has the metadata key {ascii(key)[:100]} twice")
        if before is not None and key.startswith(before):
            return GgufHeader(fields, (), cursor.data)
        cursor.what = f"the value of {ascii(key)[:100]}"
        fields[key] = cursor.field(key)
    alignment = _alignment(fields, cursor)
    return GgufHeader(fields, _tensors(cursor, n_tensors, alignment) if tensors else (), cursor.data)


def _alignment(fields: Mapping[str, GgufField], cursor: "_Cursor") -> int:
    if (field := fields.get(_ALIGNMENT_KEY)) is None:
        return _DEFAULT_ALIGNMENT
    value = 0
    if field.kind == UINT32 and field.count is None:
        value = struct.unpack_from("<I", cursor.data, field.at)[0]
    if value < 1 or value & (value - 1):
        raise HeaderError(f"has {_ALIGNMENT_KEY} = {value} of type {field.kind}, expected a uint32 and a power of two")
    return value


def _tensors(cursor: "_Cursor", count: int, alignment: int) -> tuple[GgufTensor, ...]:
    """The tensors in the order of their data, which must lie within the file and not overlap."""
    found: dict[str, GgufTensor] = {}
    for number in range(count):
        cursor.what = f"tensor {number}"
        name = cursor.name("a tensor name", _LONGEST_TENSOR_NAME)
        if name in found:
            raise HeaderError(f"has the tensor {name!r} twice")
        cursor.what = f"the tensor {name!r}"
        shape, kind, size = _shape(cursor, name)
        offset = cursor.number("Q")
        if offset % alignment:
            raise HeaderError(f"has {name!r} at offset {offset}, which is no multiple of {alignment}")
        found[name] = GgufTensor(name, shape, kind, offset, size)
    data_start = -(-cursor.at // alignment) * alignment
    tensors, taken = list[GgufTensor](), 0
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.size, tensor.name)):
        if tensor.start < taken:
            raise HeaderError(f"has {tensor.name!r} at offset {tensor.start}, within another tensor")
        taken = tensor.start + tensor.size
        if taken > _LARGEST_FILE:
            raise HeaderError(
                f"has {tensor.name!r} up to byte {data_start + taken}, but the file has {cursor.source.size}"
            )
        tensors.append(GgufTensor(tensor.name, tensor.shape, tensor.kind, data_start + tensor.start, tensor.size))
    if data_start + taken > cursor.source.size:
        name = tensors[-1].name
        raise HeaderError(f"{incomplete(cursor.source.size, data_start + taken)}: its last tensor is {name!r}")
    return tuple(tensors)


def _shape(cursor: "_Cursor", name: str) -> tuple[tuple[int, ...], int, int]:
    """Dimensions, type and size in bytes. Python's integers do not overflow, unlike those of the file's other users."""
    n_dimensions = cursor.number("I")
    if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
        raise HeaderError(f"has {name!r} with {n_dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}")
    shape = tuple(cursor.number("Q") for _ in range(n_dimensions))
    if not all(1 <= dimension < 1 << 63 for dimension in shape):
        raise HeaderError(f"has {name!r} with the dimensions {list(shape)}")
    kind = cursor.number("I")
    if kind not in TENSOR_TYPES:
        raise HeaderError(f"has {name!r} of the unknown tensor type {kind}")
    block, size = TENSOR_TYPES[kind]
    if shape[0] % block:
        raise HeaderError(f"has {name!r} with rows of {shape[0]}, which blocks of {block} cannot fill")
    return shape, kind, math.prod(shape) // block * size


class _Cursor:
    """Moves through a header value by value. ``what`` names the part that it is in, for errors."""

    def __init__(self, source: HeaderSource, limit: int) -> None:
        self.source = source
        self.data: bytes | bytearray = b""
        self.at = 0
        self.what = "its first values"
        self._limit = limit

    def advance(self, count: int) -> int:
        """Moves past ``count`` bytes, makes sure that ``data`` has them, and returns where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            self.data = first_bytes(self.source, self.at, self._limit, self.what)
        return start

    def number(self, code: str) -> int:
        start = self.advance(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def name(self, what: str, longest: int) -> str:
        length = self.number("Q")
        if not 1 <= length <= longest:
            raise HeaderError(f"has {what} of {length:,} bytes, expected 1 to {longest:,}")
        start = self.advance(length)
        try:
            return bytes(self.data[start : self.at]).decode()
        except UnicodeDecodeError:
            raise HeaderError(f"has {what} that is not UTF-8") from None

    def field(self, key: str) -> GgufField:
        kind, count = self.number("I"), None
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
        at = self.at
        if kind == STRING:
            self._skip_strings(1 if count is None else count)
        elif kind in _NUMBERS:
            self.advance((1 if count is None else count) * struct.calcsize(_NUMBERS[kind]))
        else:
            raise HeaderError(f"has {ascii(key)[:100]} of the unknown value type {kind}")
        return GgufField(kind, count, at)

    def _skip_strings(self, count: int) -> None:
        # A vocabulary has hundreds of thousands of strings, so the loop calls as little as it can.
        length_at, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            if at + 8 > len(data):
                data = self.data = first_bytes(self.source, at + 8, self._limit, self.what)
            at += 8 + length_at(data, at)[0]
        self.at = at
        self.advance(0)
