"""A model folder in Hugging Face's or MLX's layout: its JSON files and its weights, read and written."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from exo.convert.encoding import Stored, placed
from exo.convert.mlx_quantisation import AffineSettings, Quantisation, dequantise, require_mlx
from exo.convert.report import ConvertError
from exo.convert.staging import TensorFile
from exo.convert.tensor_data import Array, Kind, SourceTensor, decode, map_file
from exo.worker.protocol.validation import describe
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.header_source import HeaderError
from exo.worker.runner_common.model_files.model_folder import HfFolder, read_folder
from exo.worker.runner_common.model_files.safetensors import open_safetensors

_KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
_PACKED = "U32"
_ALIGNMENT = 8
"""The alignment of the data's beginning in a safetensors file, by the specification."""


class StrictJson(BaseModel):
    """The content of a JSON file. A string is no number."""

    model_config = ConfigDict(frozen=True, strict=True)


_Model = TypeVar("_Model", bound=StrictJson)


def read_json(path: Path, model: type[_Model]) -> _Model:
    """Raises ConvertError naming the file and the key."""
    if not path.is_file():
        raise ConvertError(str(path), "no such file; a model folder has it beside the weights")
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _broken(path.name, error) from error


def checked(folder: HfFolder, model: type[_Model]) -> _Model:
    """The configuration of a folder. Raises ConvertError naming the key."""
    try:
        return model.model_validate_json(json.dumps(folder.config))
    except ValidationError as error:
        raise _broken("config.json", error) from error


def _broken(name: str, error: ValidationError) -> ConvertError:
    return ConvertError(name, describe(error)[1].removeprefix(": "))


def write_json(path: Path, content: JsonValue) -> None:
    """Returns when the file is on the disk, so that it survives a power cut."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_source(folder: Path) -> HfFolder:
    """The folder as every reader sees it. Raises ConvertError."""
    if not (folder / "config.json").is_file():
        raise ConvertError(str(folder / "config.json"), "no such file; a model folder has it beside the weights")
    try:
        return read_folder(folder)
    except LoadError as error:
        inside = str(error).removeprefix(f"{folder}/")
        subject, _, reason = (folder.name, "", inside) if inside == str(error) else inside.partition(" ")
        raise ConvertError(subject, reason) from error


class SafetensorsModel:
    """The tensors of ``folder`` as a user of the model sees them: a quantised matrix is one tensor of its full size.

    Raises ConvertError for a broken file, and for a number format that is not float32, float16, bfloat16 or MLX's own.
    """

    def __init__(self, folder: HfFolder, quantisation: Quantisation | None) -> None:
        self._stored = {name: tensor for path in folder.weights for name, tensor in _read(path).items()}
        self._quantisation = quantisation
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._stored.items():
            if not self._belongs_to_packed(name):
                self._shapes[name] = self._full_shape(name, tensor)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a matrix as float32, [stop - start, columns]; a vector is one row."""
        tensor = self._stored[name]
        if tensor.dtype != _PACKED:
            return decode(tensor.rows[start:stop], _KINDS[tensor.dtype])
        scales, biases = (self.rows(_companion(name, kind), start, stop) for kind in ("scales", "biases"))
        packed = np.ascontiguousarray(tensor.rows[start:stop]).view(np.uint32)
        return dequantise(packed, scales, biases, self._settings_of(name))

    def _belongs_to_packed(self, name: str) -> bool:
        """Whether a tensor is the scales or biases of a quantised matrix."""
        module, _, kind = name.rpartition(".")
        weight = self._stored.get(f"{module}.weight")
        return kind in ("scales", "biases") and weight is not None and weight.dtype == _PACKED

    def _full_shape(self, name: str, tensor: SourceTensor) -> tuple[int, ...]:
        if tensor.dtype in _KINDS:
            return tensor.shape
        if tensor.dtype != _PACKED:
            raise ConvertError(name, f"is stored as {tensor.dtype}; accepted: {', '.join(_KINDS)}, MLX's quantisation")
        settings = self._settings_of(name)
        columns = tensor.shape[-1] * 32 // settings.bits
        expected = (*tensor.shape[:-1], columns // settings.group_size)
        for companion in (_companion(name, "scales"), _companion(name, "biases")):
            found = self._stored.get(companion)
            if found is None or found.shape != expected or found.dtype not in _KINDS:
                raise ConvertError(companion, f"is missing or not of shape {expected}, which {name} needs")
        return (*tensor.shape[:-1], columns)

    def _settings_of(self, name: str) -> AffineSettings:
        if self._quantisation is None:
            raise ConvertError(name, "is stored as U32, but config.json has no quantization")
        require_mlx()
        return self._quantisation.of_module(name.removesuffix(".weight"))


def _companion(weight: str, kind: str) -> str:
    return f"{weight.removesuffix('.weight')}.{kind}"


def _read(path: Path) -> dict[str, SourceTensor]:
    try:
        tensors, data = open_safetensors(path), map_file(path)
    except HeaderError as error:
        raise ConvertError(path.name, str(error)) from error
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=len(data))
    if end != len(data):
        raise ConvertError(path.name, f"has {len(data)} bytes, but its tensors end at byte {end}")
    found: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        if not 1 <= len(tensor.shape) <= 2 or 0 in tensor.shape:
            raise ConvertError(name, f"has shape {list(tensor.shape)}, expected a vector or a matrix")
        rows = data[tensor.start : tensor.start + tensor.size].reshape(math.prod(tensor.shape[:-1]), -1)
        found[name] = SourceTensor(tensor.shape, tensor.dtype, rows)
    return found


def weight_file_names(count: int) -> list[str]:
    """The names that mlx-lm gives ``count`` files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def create_safetensors(path: Path, tensors: Sequence[Stored]) -> TensorFile:
    """Writes the header and returns the file for the data."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offsets = placed(tensors, 0)
    for tensor in tensors:
        place = offsets[tensor.name]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return TensorFile(path, placed(tensors, 8 + len(text)))


def write_index(folder: Path, files: Mapping[str, str], byte_count: int) -> None:
    """``files`` is each tensor's file."""
    weight_map: JsonValue = {name: files[name] for name in sorted(files)}
    index: JsonValue = {"metadata": {"total_size": byte_count}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
