"""Writes safetensors files and their index, as mlx-lm names them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from exo.convert.encoding import Stored
from exo.convert.json_file import write_json
from exo.convert.tensor_file import TensorFile

_ALIGNMENT = 8
"""Of the data's beginning, by the specification."""


def file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def create_safetensors(path: Path, tensors: Sequence[Stored]) -> TensorFile:
    """Writes the header and returns the file for the data."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for tensor in tensors:
        places[tensor.name] = (position, position + tensor.byte_count)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": places[tensor.name],
        }
        position += tensor.byte_count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    return TensorFile(path, {name: (start + begin, start + end) for name, (begin, end) in places.items()})


def write_index(folder: Path, files: Mapping[str, str], byte_count: int) -> None:
    """``files`` is each tensor's file."""
    weight_map: JsonValue = {name: files[name] for name in sorted(files)}
    index: JsonValue = {"metadata": {"total_size": byte_count}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
