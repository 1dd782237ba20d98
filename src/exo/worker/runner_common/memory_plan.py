"""From what parts of a model take, by its settings, to the ways in which it may be loaded. Pure; runners use it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from pydantic import JsonValue

from exo.worker.protocol.events import Estimated, LoadOption

SHORTEST = 512
"""Tokens of context that "auto" goes down to, as far as the model was trained for more."""
USUAL = 4096
"""Tokens of context for whose sake others are unloaded, and layers kept off the device."""
_CELLS = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings on which memory depends most. ``n_gpu_layers`` None: it is no setting of this runner here."""

    n_ctx: int
    slots: int
    n_gpu_layers: int | None = None
    cache_type: str | None = None
    """The type of keys and values; None: the one in the model card."""
    prefix_cache_bytes: int = 0
    """Host memory for prefixes that are in no slot any more."""
    devices: tuple[str, ...] = ()
    """By name; empty where the runner uses the first one or none."""
    tensor_split: tuple[float, ...] | None = None
    """How much goes on each of ``devices``, in proportion to the others; None: as much on each."""


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes that one item takes. ``later``: it is allocated by the first request that needs it, not by loading."""

    name: str
    host: int = 0
    device: int = 0
    """Bytes on the first device; ``devices`` has bytes by the device's name."""
    later: bool = False
    devices: Mapping[str, int] = field(default_factory=dict[str, int])


Size = Callable[[Plan], Sequence[Part]]


@dataclass(frozen=True, slots=True)
class Open:
    """The settings that the model card leaves open, and their ranges."""

    n_ctx: bool = False
    n_gpu_layers: bool = False
    trained: int = USUAL
    """Tokens of context that the model was trained for."""
    layers: int = 0
    """The output counts as one more layer."""
    tensor_splits: tuple[tuple[float, ...], ...] = ()
    """Those that the devices may have, the one for whose sake others are unloaded last; empty if the card says it."""
    prefix_caches: tuple[int, ...] = ()
    """Bytes of host memory for prefixes, the size for whose sake others are unloaded last. Empty: the card says it."""
    devices: tuple[tuple[str, ...], ...] = ()
    """Others that the model could be loaded on, if the card said so."""


def estimated(plan: Plan, left: Open, size: Size, cache_types: Sequence[str] = ()) -> Estimated:
    """All choices that the model card leaves open, and plans that take less. ``plan`` has a value for each open choice.

    Long contexts come before usual ones, those before fewer layers on the device, and short contexts come last.
    ``cache_types`` are those that are smaller than the card's, the largest first.
    """
    plans = list(_plans(plan, left))
    usual = min(USUAL, left.trained)
    enough = next((at for at, each in enumerate(plans) if each.n_ctx <= usual), 0) if left.n_ctx else 0
    enough += max(1, len(left.tensor_splits)) * max(1, len(left.prefix_caches)) - 1
    return Estimated(
        choices=tuple(_choice(_chosen(each, left), size(each)) for each in plans),
        enough=enough,
        remedies=tuple(_choice(settings, size(each)) for settings, each in _remedies(plans[-1], left, cache_types)),
    )


def steps(longest: int, shortest: int) -> list[int]:
    """Lengths from ``longest`` down to ``shortest``, each about an eighth less, in whole blocks of the cache."""
    lengths = [longest]
    while (length := lengths[-1] * 7 // 8 // _CELLS * _CELLS) >= shortest:
        lengths.append(length)
    return lengths


def cells(n_ctx: int) -> int:
    """Returns the cells of a slot's cache, which consists of whole blocks in both engines."""
    return -(-n_ctx // _CELLS) * _CELLS


def _plans(plan: Plan, left: Open) -> Iterator[Plan]:
    caches, splits = left.prefix_caches or [plan.prefix_cache_bytes], left.tensor_splits or [plan.tensor_split]
    for each, size, split in product(_sizes(plan, left), caches, splits):
        yield replace(each, prefix_cache_bytes=size, tensor_split=split)


def _sizes(plan: Plan, left: Open) -> Iterator[Plan]:
    lengths = steps(left.trained, min(SHORTEST, left.trained)) if left.n_ctx else [plan.n_ctx]
    long = [length for length in lengths if length > USUAL]
    short = [length for length in lengths if length <= USUAL] or long[-1:]
    layers = [*range(left.layers, -1, -1)] if left.n_gpu_layers else [plan.n_gpu_layers]
    for n_ctx in long:
        yield replace(plan, n_ctx=n_ctx, n_gpu_layers=layers[0])
    for n_gpu_layers in layers:
        yield replace(plan, n_ctx=short[0], n_gpu_layers=n_gpu_layers)
    for n_ctx in short[1:]:
        yield replace(plan, n_ctx=n_ctx, n_gpu_layers=layers[-1])


def _chosen(plan: Plan, left: Open) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = {}
    if left.n_ctx:
        values["n_ctx"] = plan.n_ctx
    if left.n_gpu_layers:
        values["n_gpu_layers"] = plan.n_gpu_layers
    if left.prefix_caches:
        values["prefix_cache_bytes"] = plan.prefix_cache_bytes
    if left.tensor_splits:
        values["tensor_split"] = list(plan.tensor_split or ())
    return values


def _remedies(plan: Plan, left: Open, cache_types: Sequence[str]) -> Iterator[tuple[dict[str, JsonValue], Plan]]:
    """The smallest change of each setting first; at the end all that leave the model useful, together."""
    if not left.n_ctx:
        for n_ctx in steps(plan.n_ctx, min(SHORTEST, plan.n_ctx))[1:]:
            yield {"n_ctx": n_ctx}, replace(plan, n_ctx=n_ctx)
    if plan.prefix_cache_bytes:
        yield {"prefix_cache_bytes": 0}, replace(plan, prefix_cache_bytes=0)
    for slots in range(plan.slots - 1, 0, -1):
        yield {"slots": slots}, replace(plan, slots=slots)
    for kind in cache_types:
        yield {"cache_type_k": kind, "cache_type_v": kind}, replace(plan, cache_type=kind)
    if plan.n_gpu_layers is not None and not left.n_gpu_layers:
        for n_gpu_layers in range(left.layers - 1, -1, -1):
            yield {"n_gpu_layers": n_gpu_layers}, replace(plan, n_gpu_layers=n_gpu_layers)
    for names in left.devices:
        # Every device gets the same share, so that a plan that fits now fits at each later load.
        changes: dict[str, JsonValue] = {"devices": [*names]}
        if len(names) > 1:
            changes["tensor_split"] = [1 for _ in names]
        yield changes, replace(plan, devices=names, tensor_split=None)
    least = min(plan.n_ctx, SHORTEST)
    if plan.slots > 1 and plan.n_ctx > least:
        yield {"n_ctx": least, "slots": 1}, replace(plan, n_ctx=least, slots=1)
        if plan.prefix_cache_bytes:
            smallest: dict[str, JsonValue] = {"n_ctx": least, "slots": 1, "prefix_cache_bytes": 0}
            yield smallest, replace(plan, n_ctx=least, slots=1, prefix_cache_bytes=0)


def _choice(settings: Mapping[str, JsonValue], parts: Sequence[Part]) -> LoadOption:
    later = [part for part in parts if part.later]
    names = dict.fromkeys(part.name for part in parts)
    return LoadOption(
        settings=settings,
        host=sum(part.host for part in parts),
        device=sum(part.device for part in parts),
        devices=_by_device(parts),
        later_host=sum(part.host for part in later),
        later_device=sum(part.device for part in later),
        later_devices=_by_device(later),
        parts={name: sum(_size(part) for part in parts if part.name == name) for name in names},
    )


def _by_device(parts: Sequence[Part]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in parts:
        for name, size in part.devices.items():
            sizes[name] = sizes.get(name, 0) + size
    return sizes


def _size(part: Part) -> int:
    """Returns the part's size. Memory that a device and the host share counts once."""
    return max(part.host, part.device) + sum(part.devices.values())
