"""Adapters (LoRA) of which each row of a pass may have its own, so that requests with different ones share a batch.

mlx-lm's own layers apply one adapter to every row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import mlx.core as mx

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.adapter_folder import WEIGHTS, AdapterFolder

# mlx is only partly typed, so plain imports would not type-check.
nn = import_module("mlx.nn")
_unflatten: Callable[[list[tuple[str, object]]], object] = import_module("mlx.utils").tree_unflatten


class _Linear(Protocol):
    """A linear layer. A quantised one has ``scales`` in the type that it computes in."""

    weight: mx.array
    scales: mx.array

    def __call__(self, x: mx.array) -> mx.array: ...


class _LayerTree(Protocol):
    def named_modules(self) -> Iterable[tuple[str, object]]: ...
    def update_modules(self, modules: object) -> object: ...


@dataclass(slots=True)
class AdapterRows:
    """The number of each row's adapter in the pass that is being queued, 0 for none. None: no row has one."""

    rows: mx.array | None = None


class _Adapted(nn.Module):
    """A linear layer and what each adapter adds to it. Adapter 0 adds nothing."""

    def __init__(self, base: _Linear, first: mx.array, second: mx.array, pass_rows: AdapterRows) -> None:
        """``first`` has the shape (adapters + 1, in, rank), ``second`` (adapters + 1, rank, out)."""
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.base = base
        self.first = first
        self.second = second
        self._pass = pass_rows

    def __call__(self, x: mx.array) -> mx.array:
        y, rows = self.base(x), self._pass.rows
        if rows is None:
            return y
        return y + ((x @ self.first[rows]) @ self.second[rows]).astype(y.dtype)


def adapt(network: object, adapters: Sequence[AdapterFolder], pass_rows: AdapterRows) -> list[mx.array]:
    """Replaces the layers that adapters change. Returns the new arrays, not computed yet. Raises LoadError."""
    tree = cast(_LayerTree, network)
    read = [cast(Mapping[str, mx.array], mx.load(str(each.path / WEIGHTS))) for each in adapters]
    modules = dict(tree.named_modules())
    rank = max(each.rank for each in adapters)
    replaced: list[tuple[str, object]] = []
    arrays: list[mx.array] = []
    for name in dict.fromkeys(name for each in adapters for name in each.pairs()):
        if not isinstance(modules.get(name), nn.Linear | nn.QuantizedLinear):
            users = ", ".join(each.name for each in adapters if name in each.pairs())
            reason = f"mlx-lm's network has no linear layer {name}"
            raise LoadError("model_load_failed", f"model card, [[mlx.lora]] {users}: {reason}")
        base = cast(_Linear, modules[name])
        dtype = base.scales.dtype if isinstance(base, nn.QuantizedLinear) else base.weight.dtype
        pairs = [_pair(each, tensors, name) for each, tensors in zip(adapters, read, strict=True)]
        found = next(pair for pair in pairs if pair is not None)
        first = mx.zeros((len(adapters) + 1, found[0].shape[0], rank), dtype)
        second = mx.zeros((len(adapters) + 1, rank, found[1].shape[1]), dtype)
        for number, pair in enumerate(pairs, start=1):
            if pair is not None:
                first[number, :, : pair[0].shape[1]] = pair[0].astype(dtype)
                second[number, : pair[1].shape[0]] = pair[1].astype(dtype)
        replaced.append((name, _Adapted(base, first, second, pass_rows)))
        arrays += [first, second]
    tree.update_modules(_unflatten(replaced))
    return arrays


def _pair(adapter: AdapterFolder, tensors: Mapping[str, mx.array], module: str) -> tuple[mx.array, mx.array] | None:
    """Returns the two matrices of a layer, as inputs are multiplied with them, the second one scaled."""
    names = adapter.pairs().get(module)
    if names is None:
        return None
    return tensors[names[0]].T, tensors[names[1]].T * adapter.scale
