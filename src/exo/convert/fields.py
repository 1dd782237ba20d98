"""A GGUF file's metadata, read key by key and by type; it remembers which keys were read."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from exo.convert.report import ConvertError

Value = bool | int | float | str | list[str] | npt.NDArray[np.generic]
"""Arrays of numbers are numpy's, arrays of strings are lists."""

MOST = (1 << 31) - 1


class Fields:
    """Every getter raises ConvertError naming a key that is missing without a default, or of another type."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise _wrong(key, value, f"a whole number from {least} to {MOST}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """At least 0; None for an absent key."""
        return self.integer(key, least=0) if key in self else None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number as the shortest decimal that has this float32, so that 1e-6 comes back as 1e-6."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise _wrong(key, value, "a positive number")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._take(key, default)
        if not isinstance(value, str):
            raise _wrong(key, value, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._take(key, None)
        if not isinstance(value, list):
            raise _wrong(key, value, "an array of strings")
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """Exactly ``count`` numbers."""
        value = self._take(key, None)
        if not isinstance(value, np.ndarray) or value.shape != (count,):
            raise _wrong(key, value, f"an array of {count} numbers")
        return value.astype(np.float64).tolist()

    def expect(self, key: str, *accepted: Value) -> None:
        """An absent key is accepted too."""
        if key not in self:
            return
        value = self._take(key, None)
        if isinstance(value, np.ndarray) or value not in accepted:
            raise _wrong(
                key, value, f"{' or '.join(repr(each) for each in accepted)}, the only one that can be converted"
            )

    def ignore(self, *keys: str) -> None:
        """Marks keys as read whose values say nothing that the other format would have to know."""
        self._read.update(keys)

    def unread(self) -> Sequence[str]:
        return sorted(self._values.keys() - self._read)

    def _take(self, key: str, default: Value | None) -> Value:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise ConvertError(key, "this metadata key is missing")
        return value


def _wrong(key: str, value: Value, expected: str) -> ConvertError:
    shown = f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)
    return ConvertError(key, f"is {shown[:100]}, expected {expected}")
