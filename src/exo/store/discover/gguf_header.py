"""The metadata at the beginning of a GGUF file of which no more than that is there.

Format: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3. No length in the file is trusted: every byte is
asked for before it is read, and of the values only those are kept that a model card is made of.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's code of each of the specification's value types that has a fixed size."""
_KEPT = re.compile(
    r"general\.(architecture|type|name|basename|size_label)|split\.count|tokenizer\.chat_template"
    r"|[a-z0-9_-]+\.(block_count|embedding_length|context_length|pooling_type|attention\.head_count(_kv)?)"
)
_ARCHITECTURE = re.compile(r"[a-z0-9_-]{1,64}")
_LONGEST_KEY = 1 << 16
_LONGEST_TEXT = 1 << 20
_LONGEST_LIST = 1 << 10
"""Values of a list that is kept: one for each layer."""

Value = bool | int | float | str | tuple[int, ...]
Source = Callable[[int], bytes | bytearray]
"""At least so many first bytes of the file. Raises HeaderError where there are not as many."""


class HeaderError(Exception):
    """What is wrong with the file; the sentence goes on from its name."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of its model. The getters raise HeaderError."""

    values: Mapping[str, Value]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it; it begins the names of the model's own keys."""
        name = self.text("general.architecture")
        if not _ARCHITECTURE.fullmatch(name):
            raise HeaderError(f"has general.architecture = {ascii(name)[:100]}, which is no architecture's name")
        return name

    def count(self, key: str) -> int:
        """A size by its key after the architecture's name; of one for each layer, the largest."""
        found = self.optional_count(key)
        if not found:
            raise HeaderError(f"does not say {self.architecture}.{key}")
        return found

    def optional_count(self, key: str, most: int = 10_000_000) -> int:
        """0 where there is no such key."""
        name = f"{self.architecture}.{key}"
        value = self.values.get(name, 0)
        largest = max(value, default=0) if isinstance(value, tuple) else value
        if isinstance(largest, bool) or not isinstance(largest, int) or not 0 <= largest <= most:
            raise HeaderError(f"has {name} = {ascii(value)[:100]}, expected a whole number up to {most:,}")
        return largest

    def text(self, key: str) -> str:
        """Empty where there is no such key."""
        value = self.values.get(key, "")
        if not isinstance(value, str):
            raise HeaderError(f"has {key} = {ascii(value)[:100]}, expected a string")
        return value


def read_header(source: Source) -> GgufHeader:
    """Reads the metadata and nothing after it. Raises HeaderError, and what ``source`` raises."""
    cursor = _Cursor(source)
    if (magic := cursor.take(4)) != b"GGUF":
        raise HeaderError(f"is not a GGUF file: it begins with {magic!r}")
    if (version := cursor.number("I")) not in _VERSIONS:
        raise HeaderError(f"is GGUF version {version:#x}; accepted are 2 and 3, little-endian")
    cursor.number("Q")  # the number of tensors
    values: dict[str, Value] = {}
    for _ in range(cursor.number("Q")):
        key = cursor.text(_LONGEST_KEY, "a metadata key")
        value = cursor.value(key, kept=_KEPT.fullmatch(key) is not None)
        if key in values:
            raise HeaderError(f"has the metadata key {key} twice")
        if value is not None:
            values[key] = value
    return GgufHeader(values)


class _Cursor:
    """Reads one value after another."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data: bytes | bytearray = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        start = self._advance(count)
        return bytes(self._data[start : self._at])

    def number(self, code: str) -> int:
        return int(self._unpack(code))

    def text(self, longest: int, what: str) -> str:
        length = self.number("Q")
        if length > longest:
            raise HeaderError(f"has {what} of {length:,} bytes, expected at most {longest:,}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise HeaderError(f"has {what} that is not UTF-8") from None

    def value(self, key: str, *, kept: bool) -> Value | None:
        """The next value, with its type in front; None if it is not to be kept."""
        kind = self.number("I")
        if kind == _ARRAY:
            return self._array(key, kept=kept)
        if kind == _STRING:
            if kept:
                return self.text(_LONGEST_TEXT, key)
            self._skip_strings(1)
            return None
        value = self._unpack(_code(kind, key))
        return value if kept else None

    def _array(self, key: str, *, kept: bool) -> Value | None:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            self._skip_strings(count)
            return None
        code = _code(kind, key)
        start = self._advance(count * struct.calcsize(code))
        if not kept or code in "fd" or count > _LONGEST_LIST:
            return None
        return tuple(int(each) for each in struct.unpack_from(f"<{count}{code}", self._data, start))

    def _skip_strings(self, count: int) -> None:
        """Hundreds of thousands of times over, so without a call for each."""
        length_at, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
        for _ in range(count):
            if at + 8 > len(data):
                data = self._data = self._source(at + 8)
            at += 8 + length_at(data, at)[0]
        self._at = at
        self._advance(0)

    def _unpack(self, code: str) -> bool | int | float:
        start = self._advance(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self._data, start)[0]

    def _advance(self, count: int) -> int:
        """Moves past ``count`` bytes, which are then there, and returns where they begin."""
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            self._data = self._source(self._at)
        return start


def _code(kind: int, key: str) -> str:
    if kind not in _NUMBERS:
        raise HeaderError(f"has {ascii(key)[:100]} of the unknown value type {kind}")
    return _NUMBERS[kind]
