"""Reads the values of a GGUF header one after another, and never past the end of the file."""

import struct

import numpy as np

from exo.convert.fields import Value
from exo.convert.report import ConvertError
from exo.convert.tensor_data import Bytes

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's code for each of the specification's value types."""


class Cursor:
    """Every method raises ConvertError naming ``source`` where the file ends too early."""

    def __init__(self, data: Bytes, source: str) -> None:
        self._data = data.data
        self._source = source
        self.position = 0

    def take(self, count: int) -> bytes:
        return bytes(self._data[self._advance(count) : self.position])

    def number(self, code: str) -> int:
        """A whole number by struct's code, little-endian."""
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def string(self, what: str) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise ConvertError(what, f"is not UTF-8 in {self._source} at byte {self.position}") from error

    def value(self, key: str) -> Value:
        """A metadata value with its type in front."""
        kind = self.number("I")
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        code = self._code(kind, key)
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def _array(self, key: str) -> Value:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string(key) for _ in range(count)]
        dtype = np.dtype("?" if kind == _BOOL else "<" + self._code(kind, key))
        start = self._advance(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start)

    def _code(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            raise ConvertError(key, f"has the value type {kind}; accepted: numbers, strings, and arrays of either")
        return _NUMBERS[kind]

    def _advance(self, count: int) -> int:
        """Moves past ``count`` bytes and returns where they begin."""
        start = self.position
        if count > len(self._data) - start:
            raise ConvertError(self._source, f"ends within its header, at byte {len(self._data)}")
        self.position += count
        return start
