"""Finds a model's adapters (LoRA), and checks them against the model before llama.cpp opens them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.gguf import GgufHeader, GgufTensor
from exo.worker.runner_cuda.loading.file_identity import identity
from exo.worker.runner_cuda.loading.gguf_check import check_adapter, read_headers
from exo.worker.runner_cuda.loading.options import CudaOptions, find_model

_SUFFIXES = (".lora_a", ".lora_b")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's file, whose tensors fit the model's."""

    name: str
    path: Path
    scale: float
    header: GgufHeader

    @property
    def identity(self) -> str:
        """Identifies the file."""
        return hashlib.sha256(json.dumps(identity(self.path)).encode()).hexdigest()[:32]


def find_adapters(command: Load, options: CudaOptions, headers: Sequence[GgufHeader]) -> list[Adapter]:
    """Returns the card's adapters. ``headers`` are those of the model's files. Raises LoadError with the adapter."""
    found: list[Adapter] = []
    for each in options.lora:
        try:
            path = find_model(each, each.repo or command.model_id, command.directories)
            check_adapter(path)
            header = read_headers(path)[0]
            if wrong := misfit(header, headers):
                raise LoadError("model_load_failed", f"{path} {wrong}")
        except LoadError as error:
            raise LoadError(error.code, f"model card, [[cuda.lora]] {each.name}: {error}") from error
        found.append(Adapter(each.name, path, each.scale, header))
    return found


def misfit(adapter: GgufHeader, model: Sequence[GgufHeader]) -> str:
    """Returns why an adapter does not fit a model, as a predicate of its file; empty if it does."""
    if adapter.architecture != model[0].architecture:
        return f"is an adapter of {adapter.architecture} models, and this model is {model[0].architecture}"
    weights = {tensor.name: tensor for header in model for tensor in header.tensors}
    halves = {tensor.name: tensor for tensor in adapter.tensors}
    if not halves:
        return "is an adapter without tensors"
    for name in halves:
        base, suffix = name[: -len(_SUFFIXES[0])], name[-len(_SUFFIXES[0]) :]
        if suffix not in _SUFFIXES:
            return f"has the tensor {name!r}, which is not one of a pair and would have no effect"
        if wrong := _misfit(base, weights.get(base), halves):
            return wrong
    return ""


def _misfit(base: str, weight: GgufTensor | None, halves: Mapping[str, GgufTensor]) -> str:
    if weight is None:
        return f"changes {base!r}, which the model does not have"
    first, second = (halves.get(base + suffix) for suffix in _SUFFIXES)
    if first is None or second is None:
        return f"has only one of the pair of tensors for {base!r}"
    one, two, whole = (_dimensions(tensor) for tensor in (first, second, weight))
    if base == "token_embd.weight":  # its rows are looked up, so the pair is stored the other way round
        fits = (one[0], one[1], two[1]) == (two[0], whole[1], whole[0])
    else:
        fits = (one[0], one[1], two[1]) == (whole[0], two[0], whole[1])
    if fits and len(whole) <= 3 and one[2:] == two[2:] == whole[2:]:
        return ""
    shapes = " and ".join("x".join(map(str, tensor.shape)) for tensor in (first, second))
    return f"has tensors of {shapes} for {base!r}, and the model's is {'x'.join(map(str, weight.shape))}"


def _dimensions(tensor: GgufTensor) -> tuple[int, ...]:
    """The shape without trailing ones, with at least two dimensions."""
    shape = list(tensor.shape) + [1] * (2 - len(tensor.shape))
    while len(shape) > 2 and shape[-1] == 1:
        del shape[-1]
    return tuple(shape)
