"""From what parts of a model take, by its settings, to the ways in which it may be loaded. Runners use it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import psutil
from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Estimated, Layout, LoadOption

SHORTEST = 512
"""Tokens of context that an open context goes down to, as far as the model was trained for more."""
USABLE = 32_768
"""Tokens of context for whose sake slots are given up, others are unloaded, and layers are kept off the device."""
LONGEST_TEXT = 2048
"""Tokens of a text to embed, where the card does not say."""
LONG = 131_072
"""Tokens of context beyond which a second slot is worth more, and a second device is not."""
CACHE = "KV cache"
"""The name of the part that holds the slots' keys and values."""
_CELLS = 256
_SPARSE = 5
"""Every fifth length, about half of the one before it, is tried with each number of layers on the device."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings on which memory depends most. ``n_gpu_layers`` None: it is no setting of this runner here."""

    n_ctx: int
    slots: int
    pool: bool = False
    """Whether the slots share a KV cache of ``n_ctx`` tokens."""
    n_gpu_layers: int | None = None
    cpu_moe: int = 0
    """The experts of the first so many layers stay in RAM."""
    cache_type: str | None = None
    """The type of keys and values; None: the one in the model card."""
    prefix_cache_bytes: int = 0
    """Host memory for prefixes that are in no slot any more."""
    devices: tuple[str, ...] = ()
    """By name; empty where the runner uses the first one or none."""
    tensor_split: tuple[float, ...] | None = None
    """How much goes on each of ``devices``, in proportion to the others; None: as much on each."""
    projector_on_gpu: bool = True
    """Whether a model's projector is on a device; without effect where the model is not, or has none."""

    @property
    def parts(self) -> int:
        """The parts of ``n_ctx`` tokens that the KV cache has."""
        return 1 if self.pool else self.slots


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
Describe = Callable[[Plan], Layout]


@dataclass(frozen=True, slots=True)
class OnDevices:
    """Devices that a whole model may go on, and their proportions; see ``Plan``."""

    names: tuple[str, ...]
    tensor_split: tuple[float, ...] | None = None
    passing: bool = False
    """Whether the proportions are those of the memory that is free now, for which no other model is unloaded."""


@dataclass(frozen=True, slots=True)
class Open:
    """The settings that the model card leaves open, and their ranges."""

    n_ctx: bool = False
    slots: bool = False
    """Whether there may be fewer slots than the plan has."""
    pool: bool = False
    """Whether the plan's slots may also share one KV cache."""
    n_gpu_layers: bool = False
    cpu_moe: bool = False
    projector: bool = False
    """Whether the model's projector may be in RAM."""
    experts: tuple[int, ...] = ()
    """Values of ``Plan.cpu_moe``, each of which keeps the experts of one layer more in RAM than the one before."""
    small_cache: str | None = None
    """A smaller type of keys and values that the model card allows."""
    trained: int = USABLE
    """Tokens of context that the model was trained for."""
    longest: int | None = None
    """The most tokens of an open context; None: as many as the model was trained for."""
    longest_because: str = ""
    """Why ``longest`` is less than the trained length, in words."""
    layers: int = 0
    """The output counts as one more layer."""
    placements: tuple[tuple[OnDevices, ...], ...] = ()
    """Devices that the model may go on: groups of equally good ones, the best group first. Empty: the card says it."""
    balanced: Callable[[Plan], tuple[float, ...]] | None = None
    """Changes the ``tensor_split`` of a plan with experts in RAM, so that each device is filled as much as the others.
    None: the proportions stay."""
    longest_divided: int | None = None
    """The most tokens of an open context on more than one device."""
    prefix_caches: tuple[int, ...] = ()
    """Bytes of host memory for prefixes, the size for whose sake others are unloaded last. Empty: the card says it."""
    most_cache: int | None = None
    """Bytes that the KV cache takes at most while there is a smaller choice."""
    devices: tuple[tuple[str, ...], ...] = ()
    """Others that the model could be loaded on, if the card said so."""

    @property
    def lengths(self) -> list[int]:
        """The contexts to choose from, the longest first, if the card leaves it open."""
        longest = min(self.trained, self.longest or self.trained)
        starts = [longest, *(each for each in (LONG, USABLE) if each < longest)]
        ends = [*(each + 1 for each in starts[1:]), min(SHORTEST, longest)]
        return [length for start, end in zip(starts, ends, strict=True) for length in steps(start, end)]


def estimated(
    plan: Plan, left: Open, size: Size, cache_types: Sequence[str] = (), describe: Describe | None = None
) -> Estimated:
    """All choices that the model card leaves open, and plans that take less. ``plan`` has a value for each open choice,
    the largest one of those that may be reduced.

    A longer context comes before more slots, as long as there is one slot, or two beyond ``LONG``. A pool, if the slots
    may share one, takes the place of a single slot. At ``USABLE`` tokens in one slot, or in the pool, the projector
    leaves the device, and longer contexts are tried again. The smaller type of the KV cache comes next, then experts in
    RAM, then fewer layers on the device, then shorter contexts.
    ``cache_types`` are those that are smaller than the card's, the largest first.
    """
    describe = describe or _layout
    good = list(_whole(plan, left))
    sized = [(each, size(each)) for each in (*good, *_reduced(plan, left))]
    bounded = [each for each in sized if left.most_cache is None or _cache(each[1]) <= left.most_cache] or sized[-1:]
    enough, as_good = _enough([each for each, _ in bounded if each in good], left)
    last = bounded[-1][0]
    return Estimated(
        choices=tuple(_choice(_chosen(each, left), parts, describe(each)) for each, parts in bounded),
        enough=enough,
        as_good=as_good,
        remedies=tuple(
            _choice(settings, size(each), describe(each)) for settings, each in _remedies(last, left, cache_types)
        ),
        longer=tuple(
            _choice(settings, size(each), describe(each)) for settings, each in _longer(plan, left, cache_types[:1])
        ),
        trained=left.trained,
        longest_because=left.longest_because,
    )


def default_longest(tasks: Sequence[str], *, in_ram: bool) -> tuple[int | None, str]:
    """Returns the most tokens of a context that nobody sets, and why; None for as many as the model was trained for.

    ``tasks`` are the model card's. ``in_ram``: the KV cache is in RAM, which everything else on the machine needs too.
    """
    if tasks and "TextGeneration" not in tasks:
        return LONGEST_TEXT, "the most of a text to embed"
    return (USABLE, 'the default in RAM; n_ctx = "auto" takes as much as fits') if in_ram else (None, "")


def most_cache_in_ram(weights: int) -> int:
    """Returns the bytes that a KV cache in RAM takes at most by default: half of what the weights leave of all RAM."""
    return max(0, psutil.virtual_memory().total - weights) // 2


def completed(command: Load, found: Estimated, devices: Mapping[str, int]) -> Load:
    """Returns the command with the best choice that fits the free memory, for a load that nobody has reserved it for.

    ``devices`` are free bytes by device; other devices have room. If nothing fits, it is the choice that takes least.
    """
    room = psutil.virtual_memory().available, next(iter(devices.values()), 0)

    def fits(option: LoadOption) -> bool:
        named = all(size <= devices.get(name, size) for name, size in option.devices.items())
        return named and option.host <= room[0] and option.device <= room[1]

    option = next(filter(fits, found.choices), found.choices[-1])
    return command.model_copy(update={"table": {**command.table, **option.settings}})


def steps(longest: int, shortest: int) -> list[int]:
    """Lengths from ``longest`` down to ``shortest``, each about an eighth less, in whole blocks of the cache."""
    lengths = [longest]
    while (length := lengths[-1] * 7 // 8 // _CELLS * _CELLS) >= shortest:
        lengths.append(length)
    return lengths


def cells(n_ctx: int) -> int:
    """Returns the cells of a slot's cache, which consists of whole blocks in both engines."""
    return -(-n_ctx // _CELLS) * _CELLS


def _whole(plan: Plan, left: Open) -> Iterator[Plan]:
    """Plans with a context of ``USABLE`` tokens or more, and all layers on the device."""
    for n_ctx in [each for each in _lengths(plan, left) if each >= USABLE] or _lengths(plan, left)[:1]:
        for group in _groups(plan, left):
            if left.n_ctx and len(group[0].names) > 1 and n_ctx > (left.longest_divided or n_ctx):
                continue
            for slots in _slots(plan, left, least=2 if left.pool or (left.n_ctx and n_ctx > LONG) else 1):
                yield from _variants(replace(plan, n_ctx=n_ctx, slots=slots), left, group)
            if left.pool:
                yield from _variants(replace(plan, n_ctx=n_ctx, pool=True), left, group)


def _reduced(plan: Plan, left: Open) -> Iterator[Plan]:
    """Plans with what a user notices: slow pictures, a smaller type of cache, less on the device, a short context."""
    if left.projector:
        plan = replace(plan, projector_on_gpu=False)
        yield from _whole(plan, left)
    lengths, groups = _lengths(plan, left), _groups(plan, left)
    usable = min(lengths[0], max(USABLE, lengths[-1]))
    least = replace(_fewest(plan, left), n_ctx=usable, cache_type=left.small_cache or plan.cache_type)
    if left.small_cache is not None:
        for group in groups:
            yield from _variants(least, left, group)
    fewer = list(_less_on_device(least, left))
    for each in fewer:
        yield from _variants(each, left, groups[-1])
    short = [each for each in lengths if each < usable]
    for n_ctx, each in product(short[:: _SPARSE if fewer else 1], (least, *fewer)):
        for group in groups if each is least else groups[-1:]:
            yield from _variants(replace(each, n_ctx=n_ctx), left, group)


def _less_on_device(plan: Plan, left: Open) -> Iterator[Plan]:
    """The plan with the experts of more and more layers in RAM, then with fewer and fewer layers on the device."""
    if left.cpu_moe:
        for count in left.experts:
            yield (plan := replace(plan, cpu_moe=count))
    if left.n_gpu_layers:
        for n_gpu_layers in range(left.layers - 1, -1, -1):
            yield replace(plan, n_gpu_layers=n_gpu_layers)


def _lengths(plan: Plan, left: Open) -> list[int]:
    return left.lengths if left.n_ctx else [plan.n_ctx]


def _slots(plan: Plan, left: Open, least: int = 1) -> Sequence[int]:
    return range(plan.slots, min(least, plan.slots) - 1, -1) if left.slots else (plan.slots,)


def _fewest(plan: Plan, left: Open, least: int = 1) -> Plan:
    """Returns the plan with a pool, or else with as few slots as may be."""
    return replace(plan, pool=True) if left.pool else replace(plan, slots=min(_slots(plan, left, least)))


def _groups(plan: Plan, left: Open) -> Sequence[Sequence[OnDevices]]:
    return left.placements or ((OnDevices(plan.devices, plan.tensor_split),),)


def _variants(plan: Plan, left: Open, group: Sequence[OnDevices]) -> Iterator[Plan]:
    for prefixes, place in product(left.prefix_caches or (plan.prefix_cache_bytes,), group):
        yield _placed(replace(plan, prefix_cache_bytes=prefixes), place, left)


def _placed(plan: Plan, place: OnDevices, left: Open) -> Plan:
    placed = replace(plan, devices=place.names, tensor_split=place.tensor_split)
    if left.balanced is None or len(place.names) < 2 or not (plan.cpu_moe and plan.n_gpu_layers):
        return placed
    return replace(placed, tensor_split=left.balanced(placed))


def _enough(good: Sequence[Plan], left: Open) -> tuple[int, int]:
    """Returns the index of the first plan that justifies unloading others, and the number of good ones behind it."""
    if not good:
        return 0, 0
    passing = [each for group in left.placements for each in group if each.passing]
    least = good[-1]
    for index, each in enumerate(good):
        same = replace(each, devices=least.devices, tensor_split=least.tensor_split) == least
        if same and each not in [_placed(each, place, left) for place in passing]:
            return index, len(good) - 1 - index
    return len(good) - 1, 0


def _chosen(plan: Plan, left: Open) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = {}
    if left.n_ctx:
        values["n_ctx"] = plan.n_ctx
    if left.slots:
        values["slots"] = plan.slots
    if left.pool:
        values["kv"] = "pool" if plan.pool else "split"
    if left.n_gpu_layers:
        values["n_gpu_layers"] = plan.n_gpu_layers
    if left.cpu_moe:
        values["cpu_moe"] = plan.cpu_moe
    if left.projector:
        values["mmproj_offload"] = plan.projector_on_gpu
    if left.small_cache is not None and plan.cache_type is not None:
        values |= {"cache_type_k": plan.cache_type, "cache_type_v": plan.cache_type}
    if left.prefix_caches:
        values["prefix_cache_bytes"] = plan.prefix_cache_bytes
    if left.placements:
        values["devices"] = list(plan.devices)
        if plan.tensor_split is not None:
            values["tensor_split"] = list(plan.tensor_split)
    return values


def _longer(plan: Plan, left: Open, cache_types: Sequence[str]) -> Iterator[tuple[dict[str, JsonValue], Plan]]:
    """Contexts that another type of the KV cache may make room for, the longest first, in as few slots as may be."""
    if not left.n_ctx or left.small_cache is not None:
        return
    for kind, n_ctx, group in product(cache_types, left.lengths, _groups(plan, left)):
        other = replace(_fewest(plan, left, 2 if n_ctx > LONG else 1), n_ctx=n_ctx, cache_type=kind)
        for each in _variants(other, left, group):
            yield {"n_ctx": n_ctx, "cache_type_k": kind, "cache_type_v": kind}, each


def _remedies(plan: Plan, left: Open, cache_types: Sequence[str]) -> Iterator[tuple[dict[str, JsonValue], Plan]]:
    """The smallest change of each setting first; at the end all that leave the model useful, together."""
    if not left.n_ctx:
        for n_ctx in steps(plan.n_ctx, min(SHORTEST, plan.n_ctx))[1:]:
            yield {"n_ctx": n_ctx}, replace(plan, n_ctx=n_ctx)
    if plan.prefix_cache_bytes:
        yield {"prefix_cache_bytes": 0}, replace(plan, prefix_cache_bytes=0)
    for slots in range(plan.slots - 1, 0, -1) if not plan.pool else ():
        yield {"slots": slots}, replace(plan, slots=slots)
    for kind in cache_types:
        yield {"cache_type_k": kind, "cache_type_v": kind}, replace(plan, cache_type=kind)
    if plan.n_gpu_layers and not left.cpu_moe:
        for count in left.experts:
            if count > plan.cpu_moe:
                yield {"cpu_moe": count}, replace(plan, cpu_moe=count)
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


def _choice(settings: Mapping[str, JsonValue], parts: Sequence[Part], layout: Layout) -> LoadOption:
    later = [part for part in parts if part.later]
    names = dict.fromkeys(part.name for part in parts)
    return LoadOption(
        settings=settings,
        layout=layout,
        host=sum(part.host for part in parts),
        device=sum(part.device for part in parts),
        devices=_by_device(parts),
        later_host=sum(part.host for part in later),
        later_device=sum(part.device for part in later),
        later_devices=_by_device(later),
        parts={name: sum(_size(part) for part in parts if part.name == name) for name in names},
    )


def _layout(plan: Plan) -> Layout:
    return Layout(context_length=plan.n_ctx, slots=plan.slots, kv="pool" if plan.pool else "split")


def _cache(parts: Sequence[Part]) -> int:
    return sum(_size(part) for part in parts if part.name == CACHE)


def _by_device(parts: Sequence[Part]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in parts:
        for name, size in part.devices.items():
            sizes[name] = sizes.get(name, 0) + size
    return sizes


def _size(part: Part) -> int:
    """Returns the part's size. Memory that a device and the host share counts once."""
    return max(part.host, part.device) + sum(part.devices.values())
