"""Writes a GGUF file: gguf-py the header, ``TensorFile`` the data, since gguf-py wants each tensor as a whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from exo.convert.encoding import Stored
from exo.convert.tensor_data import Kind
from exo.convert.tensor_file import TensorFile

Metadata = Mapping[str, bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]]


def create_gguf(path: Path, architecture: str, metadata: Metadata, tensors: Sequence[Stored]) -> TensorFile:
    """Writes the header and returns the file for the data. Whole numbers are stored as uint32, others as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
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
    ends: dict[str, tuple[int, int]] = {}
    position = 0
    for tensor in tensors:
        # The array's type says nothing beside raw_dtype, but would be taken for packed rows if it were uint8.
        float32 = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.byte_count, raw_dtype=Kind[tensor.dtype])
        ends[tensor.name] = (position, position + tensor.byte_count)
        position += gguf.GGUFWriter.ggml_pad(tensor.byte_count, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)
    return TensorFile(path, {name: (start + begin, start + end) for name, (begin, end) in ends.items()})
