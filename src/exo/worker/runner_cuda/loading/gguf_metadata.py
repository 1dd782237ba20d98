"""What a GGUF file's header says, read by ggml's own functions, which the bindings leave out.

Only for files that ``gguf_check`` has passed.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from exo.worker.runner_common.load_error import LoadError

_SCALARS = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 7: "bool", 10: "u64", 11: "i64"}
"""``enum gguf_type`` of whole numbers, and what the function that gives one is called after."""
_STRING, _ARRAY = 8, 9
_NUMBERS = {4: ctypes.c_uint32, 5: ctypes.c_int32, 7: ctypes.c_bool}
"""Types of an array's elements that are read."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor. ``kind`` is ggml's number of its type."""

    name: str
    size: int
    """Bytes."""
    kind: int


@dataclass(slots=True)
class Header:
    """Whole numbers, texts and lists of whole numbers by key; of other lists, the length as ``key + "#"``."""

    numbers: dict[str, int] = field(default_factory=dict[str, int])
    texts: dict[str, str] = field(default_factory=dict[str, str])
    lists: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    tensors: list[Tensor] = field(default_factory=list[Tensor])

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Raises LoadError."""
        lib = _library()
        handle = lib.gguf_init_from_file(str(path).encode(), _Params(no_alloc=True))
        if not handle:
            raise LoadError("model_load_failed", f"llama.cpp cannot read the header of {path}")
        try:
            header = cls(tensors=list(_tensors(lib, handle)))
            for at in range(lib.gguf_get_n_kv(handle)):
                header._read(lib, handle, at)
        finally:
            lib.gguf_free(handle)
        return header

    def _read(self, lib: ctypes.CDLL, handle: int, at: int) -> None:
        key, kind = lib.gguf_get_key(handle, at).decode(), lib.gguf_get_kv_type(handle, at)
        if kind == _STRING:
            self.texts[key] = lib.gguf_get_val_str(handle, at).decode(errors="replace")
        elif kind in _SCALARS:
            self.numbers[key] = int(getattr(lib, f"gguf_get_val_{_SCALARS[kind]}")(handle, at))
        elif kind == _ARRAY:
            length, element = lib.gguf_get_arr_n(handle, at), lib.gguf_get_arr_type(handle, at)
            self.numbers[f"{key}#"] = length
            if element in _NUMBERS and not key.startswith("tokenizer."):
                values = ctypes.cast(lib.gguf_get_arr_data(handle, at), ctypes.POINTER(_NUMBERS[element]))
                self.lists[key] = [int(values[index]) for index in range(length)]

    def has(self, *names: str) -> bool:
        """Whether there is one of these tensors."""
        return any(tensor.name in names for tensor in self.tensors)

    def per_layer(self, key: str, n_layers: int, default: int) -> list[int]:
        """A number that may differ from layer to layer."""
        if (listed := self.lists.get(key)) is not None and len(listed) >= n_layers:
            return listed[:n_layers]
        return [self.numbers.get(key, default)] * n_layers


class _Params(ctypes.Structure):
    """``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("tensors", ctypes.c_void_p))


def _tensors(lib: ctypes.CDLL, handle: int) -> Iterator[Tensor]:
    for at in range(lib.gguf_get_n_tensors(handle)):
        name = lib.gguf_get_tensor_name(handle, at).decode(errors="replace")
        yield Tensor(name, lib.gguf_get_tensor_size(handle, at), lib.gguf_get_tensor_type(handle, at))


def _library() -> ctypes.CDLL:
    from llama_cpp.llama_cpp import _lib as lib  # pyright: ignore[reportPrivateUsage]

    handle, index = ctypes.c_void_p, ctypes.c_int64
    for name, arguments, result in (
        ("gguf_init_from_file", [ctypes.c_char_p, _Params], handle),
        ("gguf_free", [handle], None),
        ("gguf_get_n_kv", [handle], index),
        ("gguf_get_key", [handle, index], ctypes.c_char_p),
        ("gguf_get_kv_type", [handle, index], ctypes.c_int),
        ("gguf_get_arr_type", [handle, index], ctypes.c_int),
        ("gguf_get_arr_n", [handle, index], ctypes.c_size_t),
        ("gguf_get_arr_data", [handle, index], handle),
        ("gguf_get_val_str", [handle, index], ctypes.c_char_p),
        ("gguf_get_n_tensors", [handle], index),
        ("gguf_get_tensor_name", [handle, index], ctypes.c_char_p),
        ("gguf_get_tensor_type", [handle, index], ctypes.c_int),
        ("gguf_get_tensor_size", [handle, index], ctypes.c_size_t),
        *((f"gguf_get_val_{name}", [handle, index], _RESULTS[name]) for name in _SCALARS.values()),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib


_RESULTS = {
    "u8": ctypes.c_uint8,
    "i8": ctypes.c_int8,
    "u16": ctypes.c_uint16,
    "i16": ctypes.c_int16,
    "u32": ctypes.c_uint32,
    "i32": ctypes.c_int32,
    "u64": ctypes.c_uint64,
    "i64": ctypes.c_int64,
    "bool": ctypes.c_bool,
}
