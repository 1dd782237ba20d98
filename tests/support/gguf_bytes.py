"""The bytes of GGUF headers, field by field."""

import struct

from exo.worker.runner_common.model_files.gguf import GgufHeader, read_gguf


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(*fields: bytes, version: int = 3, claimed: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 7, len(fields) if claimed is None else claimed) + b"".join(fields)


def number(key: str, value: int) -> bytes:
    return field(key, 4, struct.pack("<I", value))


LLAMA = (
    field("general.architecture", 8, text("llama")),
    field("general.name", 8, text("A model\x1b[2J")),
    number("llama.block_count", 4),
    number("llama.embedding_length", 64),
    number("llama.context_length", 10_485_760),
)


class Source:
    """A file of which a reader gets no byte that it does not ask for."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self.asked = [0]
        self._data = data

    def upto(self, end: int) -> bytes:
        self.asked.append(end)
        return self._data[:end]


def read(data: bytes) -> GgufHeader:
    """The metadata."""
    return read_gguf(Source(data), tensors=False)
