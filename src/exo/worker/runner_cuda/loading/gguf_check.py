"""Whether a GGUF file is what its header says: ``python -m exo.worker.runner_cuda.loading.gguf_check FILE``.

llama.cpp trusts a file in places where a wrong length or offset makes it read and write what is not its own. So no byte
of a file reaches it before this program, in a process of its own with little memory and time, has followed every
length. Exit status 0: the file, and with it the others of a split model, is sound; 1: it is not, and standard
output says why.

Format: the GGUF specification of ggml (docs/gguf.md). Of what the values mean, only sizes are looked at.
"""

import math
import mmap
import re
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

HEADER_LIMIT = 512 << 20
"""Bytes before the tensors' data; a vocabulary of 262,144 tokens takes about 15 MB."""
_ADDRESS_SPACE = 2 << 30
_CPU_SECONDS = 20

_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, _BOOL: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each of the specification's value types that has a fixed size."""
_KEY_BYTES, _TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
"""The least that one key with its value, or one tensor, takes in the header."""
_NAME_LENGTH = 63
_DIMENSIONS = 4
_ALIGNMENT = 32
_UINT32 = 4
_MOST = {"block_count": 512, "embedding_length": 1 << 20, "feed_forward_length": 1 << 24, "expert_count": 512} | {
    f"attention.{name}": 1 << 16 for name in ("head_count", "head_count_kv", "key_length", "value_length")
}
"""The largest values, by key without the architecture before it, with which llama.cpp does not abort its process."""

_TOKENS = "tokenizer.ggml.tokens"
_SHOWN = 80

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


_PART = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf")


class HeaderError(Exception):
    """The file is not sound; the message says where and why."""


class Header:
    """Follows a header from its first byte to the tensors' data. Every method raises HeaderError."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data = data
        self._size = size
        """Bytes of the file; ``data`` may hold only its beginning."""
        self._at = 0
        self._alignment = _ALIGNMENT

    def check(self) -> None:
        if (magic := self._take(4, "its first word")) != b"GGUF":
            raise HeaderError(f"it begins with {magic!r}, not b'GGUF'")
        if (version := self._number("<I", "its version")) not in _VERSIONS:
            raise HeaderError(f"it is GGUF version {version:#x}; accepted are 2 and 3, little-endian")
        tensors = self._number("<Q", "the number of tensors")
        keys = self._number("<Q", "the number of keys")
        room = self._size - self._at
        if keys * _KEY_BYTES + tensors * _TENSOR_BYTES > room:
            raise HeaderError(f"it claims {keys} keys and {tensors} tensors, which do not fit into {room} bytes")
        self._check_keys(keys)
        self._check_tensors(tensors)

    def _check_keys(self, count: int) -> None:
        seen = set[str]()
        for index in range(count):
            key = self._name(f"the name of key {index}")
            if key in seen:
                raise HeaderError(f"the key {key!r} is there twice")
            seen.add(key)
            kind = self._number("<I", f"the type of {key!r}")
            if key == "general.alignment":
                self._alignment = self._read_alignment(kind)
            elif kind == _ARRAY:
                self._skip_array(key)
            elif kind == _UINT32:
                self._check_size(key)
            elif kind == _STRING:
                self._skip_strings(1, key)
            else:
                self._skip_numbers(kind, 1, key)

    def _read_alignment(self, kind: int) -> int:
        value = self._number("<I", "general.alignment") if kind == _UINT32 else 0
        if value < 1 or value & (value - 1):
            raise HeaderError(f"general.alignment must be a uint32 and a power of two (type {kind}, value {value})")
        return value

    def _check_size(self, key: str) -> None:
        value = self._number("<I", f"the value of {key!r}")
        most = _MOST.get(key.partition(".")[2], value)
        if value > most:
            raise HeaderError(f"{key!r} is {value}, expected at most {most}")

    def _skip_array(self, key: str) -> None:
        kind = self._number("<I", f"the type of the array {key!r}")
        count = self._number("<Q", f"the length of the array {key!r}")
        if key == _TOKENS and kind == _STRING:
            self._check_tokens(count, key)
        elif kind == _STRING:
            self._skip_strings(count, key)
        else:
            self._skip_numbers(kind, count, key)

    def _skip_numbers(self, kind: int, count: int, key: str) -> None:
        if kind not in _SIZES:
            raise HeaderError(f"{key!r} has the unknown value type {kind}")
        values = self._take(count * _SIZES[kind], f"the value of {key!r}")
        if kind == _BOOL and values.strip(b"\0\1"):
            raise HeaderError(f"{key!r} has a truth value that is neither 0 nor 1")

    def _skip_strings(self, count: int, key: str) -> None:
        """Hundreds of thousands of times over, so without a call for each."""
        data, at, end = self._data, self._at, len(self._data)
        if count * 8 > end - at:
            raise self._cut(f"the {count} strings of {key!r}")
        length_at = struct.Struct("<Q").unpack_from
        for index in range(count):
            if at + 8 > end:
                raise self._cut(f"string {index} of {key!r}")
            at += 8 + length_at(data, at)[0]
        if at > end:
            raise self._cut(f"a string of {key!r}")
        self._at = at

    def _check_tokens(self, count: int, key: str) -> None:
        """llama.cpp aborts its process at a token that is there twice; empty ones it numbers."""
        data, at = self._data, self._at
        self._skip_strings(count, key)
        numbers: dict[bytes, int] = {}
        length_at = struct.Struct("<Q").unpack_from
        for number in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            token = data[start:at]
            if token and (first := numbers.setdefault(token, number)) != number:
                shown = token[:_SHOWN].decode(errors="replace")
                raise HeaderError(f"{key!r} has the token {shown!r} twice, as numbers {first} and {number}")

    def _check_tensors(self, count: int) -> None:
        places: list[tuple[int, int, str]] = []
        seen = set[str]()
        for index in range(count):
            name = self._name(f"the name of tensor {index}", _NAME_LENGTH)
            if name in seen:
                raise HeaderError(f"the tensor {name!r} is there twice")
            seen.add(name)
            size = self._tensor_size(name)
            offset = self._number("<Q", f"the offset of {name!r}")
            if offset % self._alignment:
                raise HeaderError(f"{name!r} lies at offset {offset}, which is no multiple of {self._alignment}")
            places.append((offset, size, name))
        start = -(-self._at // self._alignment) * self._alignment
        taken = 0
        for offset, size, name in sorted(places):
            if offset < taken:
                raise HeaderError(f"{name!r} lies at offset {offset}, within another tensor")
            taken = offset + size
            if start + taken > self._size:
                raise HeaderError(f"{name!r} ends at byte {start + taken}, but the file has {self._size}")

    def _tensor_size(self, name: str) -> int:
        """Bytes of a tensor, from its dimensions and type. Python's numbers do not overflow."""
        count = self._number("<I", f"the number of dimensions of {name!r}")
        if not 1 <= count <= _DIMENSIONS:
            raise HeaderError(f"{name!r} has {count} dimensions, expected 1 to {_DIMENSIONS}")
        dimensions = [self._number("<Q", f"a dimension of {name!r}") for _ in range(count)]
        if not all(1 <= dimension < 1 << 63 for dimension in dimensions):
            raise HeaderError(f"{name!r} has the dimensions {dimensions}")
        kind = self._number("<I", f"the type of {name!r}")
        if kind not in TENSOR_TYPES:
            raise HeaderError(f"{name!r} has the unknown tensor type {kind}")
        block, size = TENSOR_TYPES[kind]
        if dimensions[0] % block:
            raise HeaderError(f"{name!r} has rows of {dimensions[0]}, which blocks of {block} cannot fill")
        return math.prod(dimensions) // block * size

    def _name(self, what: str, longest: int = 65535) -> str:
        length = self._number("<Q", what)
        if not 1 <= length <= longest:
            raise HeaderError(f"{what} is {length} bytes long, expected 1 to {longest}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise HeaderError(f"{what} is not UTF-8") from None

    def _number(self, form: str, what: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form), what))[0])

    def _take(self, count: int, what: str) -> bytes:
        if count > len(self._data) - self._at:
            raise self._cut(what)
        self._at += count
        return self._data[self._at - count : self._at]

    def _cut(self, what: str) -> HeaderError:
        if len(self._data) < self._size:
            return HeaderError(f"its header is longer than {HEADER_LIMIT} bytes")
        return HeaderError(f"it ends, at byte {self._size}, before {what} does")


def check_file(path: Path) -> None:
    """Raises HeaderError, and OSError where the file cannot be read."""
    size = path.stat().st_size
    if size < 4:
        raise HeaderError(f"it has only {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), min(size, HEADER_LIMIT), access=mmap.ACCESS_READ) as data:
        Header(data, size).check()


def _limit_this_process() -> None:
    for limit, value in (
        (resource.RLIMIT_AS, _ADDRESS_SPACE),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # not every system has every limit; the owner's deadline holds
            resource.setrlimit(limit, (value, value))


def parts(path: Path) -> Iterator[Path]:
    """Every file of the split model that ``path`` is one of, by the names that llama.cpp looks for, or ``path``."""
    match = _PART.fullmatch(path.name)
    if match is None:
        yield path
        return
    for number in range(1, int(match[2]) + 1):
        yield path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf")


def main() -> None:
    """Checks the file that is named, and those that belong to it."""
    _limit_this_process()
    for path in parts(Path(sys.argv[1])):
        try:
            check_file(path)
        except HeaderError as error:
            sys.exit(_say(f"{path} is not a GGUF file that can be loaded: {error}"))
        except OSError as error:
            sys.exit(_say(f"{path} cannot be read: {error.strerror}"))


def _say(reason: str) -> int:
    sys.stdout.write(reason)
    return 1


if __name__ == "__main__":
    main()
