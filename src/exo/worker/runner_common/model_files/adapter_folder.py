"""Adapters (LoRA) in PEFT's format, for the engines that read folders of safetensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.folder_config import Json
from exo.worker.runner_common.model_files.model_folder import (
    FolderOptions,
    HfFolder,
    file_tensors,
    find_folder,
    read_optional,
)
from exo.worker.runner_common.model_files.model_name import ADAPTER_NAME, stays_inside
from exo.worker.runner_common.model_files.safetensors import SafetensorsTensor

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")
_FLOATS = ("F16", "BF16", "F32")
_PLAIN = ("bias", "modules_to_save", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias")
"""Settings of PEFT's that change the computation, unless they are empty, false or "none"."""


class AdapterOptions(BaseModel):
    """Keys of ``[[mlx.lora]]`` and ``[[vllm.lora]]``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=ADAPTER_NAME)
    path: str | None = None
    """A folder with adapter_config.json and adapter_model.safetensors."""
    repo: str | None = None

    _stays_inside = field_validator("path", "repo")(stays_inside)

    @model_validator(mode="after")
    def _names_one_folder(self) -> "AdapterOptions":
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either path or repo")
        return self


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter that fits the model. ``scale`` is the factor of what it adds."""

    name: str
    path: Path
    rank: int
    scale: float
    tensors: Mapping[str, SafetensorsTensor]

    def pairs(self) -> dict[str, tuple[str, str]]:
        """The names of the two tensors of each module that the adapter changes, by the module's name."""
        first, second = _HALVES
        modules = (name.removesuffix(first) for name in self.tensors if name.endswith(first))
        return {module.removeprefix(_PREFIX): (module + first, module + second) for module in modules}


def find_adapters(
    options: Sequence[AdapterOptions], model_id: str, directories: Sequence[str], model: HfFolder, runner: str
) -> list[AdapterFolder]:
    """Returns a card's adapters. Raises LoadError with the adapter at fault."""
    found: list[AdapterFolder] = []
    for each in options:
        try:
            if each.name in [other.name for other in found]:
                raise LoadError("model_misconfigured", "another adapter has the same name")
            place = find_folder(FolderOptions(path=each.path, repo=each.repo), each.repo or model_id, directories)
            found.append(_read(each.name, place, model))
        except LoadError as error:
            raise LoadError(error.code, f"model card, [[{runner}.lora]] {each.name}: {error}") from error
    return found


def _read(name: str, path: Path, model: HfFolder) -> AdapterFolder:
    """Raises LoadError for a folder that is no such adapter, or one of another model."""
    config = read_optional(path, "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise _unfit(f"{path / 'adapter_config.json'} does not say peft_type = LORA")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not 1 <= rank <= 512:
        raise _unfit(f"{path / 'adapter_config.json'} has r = {rank} and lora_alpha = {alpha}, expected two numbers")
    if (
        other := next((key for key in _PLAIN if config.get(key) not in (None, False, "none", [], {})), None)
    ) is not None:
        raise _unfit(f"{path / 'adapter_config.json'} has {other} = {config[other]}, which is not supported")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    adapter = AdapterFolder(name, path, rank, scale, file_tensors(path / WEIGHTS))
    _check(adapter, model, config)
    return adapter


def _check(adapter: AdapterFolder, model: HfFolder, config: Json) -> None:
    """Raises LoadError unless each tensor is one of a pair for a matrix of the model."""
    pairs, file = adapter.pairs(), adapter.path / WEIGHTS
    paired = {name for pair in pairs.values() for name in pair}
    if not pairs or paired != set(adapter.tensors):
        odd = sorted(paired ^ adapter.tensors.keys())[:1] or ["none"]
        raise _unfit(f"{file} has tensors that are no pairs for a matrix: {odd[0]}")
    for module, (first, second) in pairs.items():
        weight = model.tensors.get(f"{module}.weight")
        if weight is None:
            base = config.get("base_model_name_or_path")
            raise _unfit(f"{file} changes {module}, which the model does not have; it is an adapter of {base}")
        one, two = adapter.tensors[first], adapter.tensors[second]
        inner, outer = one.shape[-1], two.shape[0]
        whole = weight.shape if weight.dtype in _FLOATS else (outer, inner)  # others are packed
        if (one.shape, two.shape, whole) != ((adapter.rank, inner), (outer, adapter.rank), (outer, inner)):
            shapes = f"{list(one.shape)} and {list(two.shape)}"
            raise _unfit(f"{file} has tensors of {shapes} for {module}, and the model's is {list(weight.shape)}")
        if not {one.dtype, two.dtype} <= set(_FLOATS):
            raise _unfit(f"{file} has tensors of {one.dtype} and {two.dtype}, expected {', '.join(_FLOATS)}")


def _unfit(message: str) -> LoadError:
    return LoadError("model_load_failed", message)
