"""Writes a GGUF file with changes, as another tool or a broken download might have left it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from exo.convert.gguf_file import MetadataValue, add_value

GENERATED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")

Kind = gguf.GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class Edit:
    """The changes. None removes a key or a tensor."""

    keys: Mapping[str, MetadataValue | None] = field(default_factory=dict[str, MetadataValue | None])
    """Integers become uint32, in an array int32."""
    tensors: Mapping[str, NDArray[Any] | None] = field(default_factory=dict[str, NDArray[Any] | None])
    """Tensors to store in their numpy type."""
    raw: Mapping[str, tuple[NDArray[np.uint8], Kind]] = field(default_factory=dict[str, tuple[NDArray[np.uint8], Kind]])
    """Bytes to store unchanged, [rows, bytes of a row], and the type that the file states for them."""
    architecture: str | None = None
    part_size: int = 0
    """Tensors per file of a split model; 0 for a single file."""


def rewrite(source: Path, target: Path, edit: Edit) -> None:
    reader = gguf.GGUFReader(source)
    field = reader.get_field("general.architecture")
    assert field is not None
    old, new = field.contents(), edit.architecture or field.contents()
    writer = gguf.GGUFWriter(target, new, split_max_tensors=edit.part_size)
    for name, value in reader.fields.items():
        if name not in GENERATED and name not in edit.keys:
            array_of = value.types[-1] if len(value.types) > 1 else None
            writer.add_key_value(name.replace(f"{old}.", f"{new}.", 1), value.contents(), value.types[0], array_of)
    for key, value in edit.keys.items():
        if value is not None:
            add_value(writer, key, value)
    for tensor in reader.tensors:
        if tensor.name not in edit.tensors and tensor.name not in edit.raw:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in edit.tensors.items():
        if data is not None:
            writer.add_tensor(name, data)
    for name, (data, kind) in edit.raw.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoded(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a GGUF file in float32, by gguf-py's own reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def spoil(good: Path, bad: Path, tensor: str, token: int = 120) -> None:
    """Writes a copy of a file in which a token's row of a tensor is no numbers."""
    weights = next(each for each in gguf.GGUFReader(good).tensors if each.name == tensor).data.copy()
    weights[token] = np.nan
    rewrite(good, bad, Edit(tensors={tensor: weights}))
