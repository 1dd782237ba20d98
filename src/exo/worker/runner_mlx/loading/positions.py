"""The rotary embeddings that a configuration asks for, and those that a network of mlx-lm computes.

Classes of mlx-lm ignore some settings of rotary embeddings, or use them in another way than transformers: one rotates
whole heads where half is meant, another falls back to unscaled positions. The rotation of a network is measured, and
where it is not what the configuration says, the network's modules are replaced by ones that compute it.
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import mlx.core as mx
from pydantic import JsonValue

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.folder_config import Json

SETTINGS = frozenset({"rope_scaling", "rope_theta", "partial_rotary_factor"})
"""Keys of a configuration that ``Rotation`` expresses."""
_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "dynamic": frozenset({"factor"}),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "longrope": frozenset(
        {"factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate",
            "original_max_position_embeddings",
        }
    ),
}  # fmt: skip
"""The settings of each type of rotary embeddings."""
_ALWAYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
_TOLERANCE = 0.005
"""The relative error of a measured angle that float32 may cause."""
_POSITIONS = (1, 10, 100)
"""Where it is measured: the largest at which a pair has turned by at most 1."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angle in radians by which a position turns each pair of elements, and the factor of their lengths."""

    angles: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class WantedPositions:
    """A configuration's rotary embedding. ``unread`` says that mlx-lm's class does not read all of it."""

    rotation: Rotation
    unread: bool
    refusal: LoadError


class _Rope(Protocol):
    """A module of MLX or mlx-lm that rotates. Some name their number of elements ``dims``, others ``dim``."""

    def __call__(self, x: mx.array, offset: int) -> mx.array: ...


class _ModuleTree(Protocol):
    def named_modules(self) -> list[tuple[str, MutableMapping[str, object]]]: ...


def rotation(sizes: Json, n_ctx: int) -> Rotation | None:
    """Returns the rotation that a language model's configuration says for a context of ``n_ctx`` tokens.

    ``sizes`` includes transformers' defaults. Returns None if layers differ in their settings, or the type of
    embeddings or one of its settings is not known here.
    """
    rope = sizes.get("rope_parameters")
    if not isinstance(rope, dict):
        return None
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", sizes.get("rope_theta"))
    known = _KEYS.get(kind) if isinstance(kind, str) else None
    used = {key: value for key, value in rope.items() if value is not None}
    width = _width(sizes)
    if known is None or used.keys() - known - _ALWAYS or width is None or not isinstance(base, int | float):
        return None
    plain = [base ** (-index / width) for index in range(0, width, 2)]
    try:
        return _scaled(str(kind), plain, {"rope_theta": base, **used}, sizes, n_ctx)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError):
        return None  # the engine's own check names the value


def apply(network: object, wanted: WantedPositions) -> None:
    """Makes a network rotate as its configuration says. Raises LoadError if that cannot be done.

    A network with a matching module may have others: layers without scaling, or with a window.
    """
    found = list(_ropes(network))
    if any(_matches(rope, wanted.rotation) for _, _, rope in found):
        return
    if not found and not wanted.unread:
        return  # the network rotates in code of its own, which reads all settings
    if len({_signature(rope) for _, _, rope in found}) != 1:
        raise wanted.refusal
    for parent, name, rope in found:
        parent[name] = _configured(wanted.rotation, traditional=_is_traditional(rope))


def _width(sizes: Json) -> int | None:
    """Returns the elements of a head that are rotated."""
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    for key in ("qk_rope_head_dim", "rotary_dim"):
        if isinstance(width := sizes.get(key), int):
            return width
    head = sizes.get("head_dim")
    if head is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        head = hidden // heads
    part = sizes.get("partial_rotary_factor", 1.0)
    return int(head * part) if isinstance(head, int) and isinstance(part, int | float) else None


def _scaled(kind: str, plain: list[float], rope: Json, sizes: Json, n_ctx: int) -> Rotation:
    """Raises KeyError, TypeError or an arithmetic error for settings that are missing or cannot be."""

    def number(key: str) -> float:
        value = rope[key]
        if not isinstance(value, int | float):
            raise TypeError(key)
        return value

    match kind:
        case "linear":
            return Rotation(tuple(angle / number("factor") for angle in plain))
        case "llama3":
            short, long = number("high_freq_factor"), number("low_freq_factor")
            before = number("original_max_position_embeddings")
            return Rotation(tuple(_llama3(angle, number("factor"), long, short, before) for angle in plain))
        case "longrope":
            before = number("original_max_position_embeddings")
            factors = cast(list[float], rope["long_factor" if n_ctx > before else "short_factor"])
            stretch = number("factor") if "factor" in rope else cast(float, sizes["max_position_embeddings"]) / before
            usual = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(before))
            factor = number("attention_factor") if "attention_factor" in rope else usual
            return Rotation(tuple(angle / each for angle, each in zip(plain, factors, strict=True)), factor)
        case "yarn":
            return _yarn(plain, rope, number)
        case _:
            return Rotation(tuple(plain))


def _llama3(angle: float, factor: float, low: float, high: float, before: float) -> float:
    wave = 2 * math.pi / angle
    if wave < before / high:
        return angle
    if wave > before / low:
        return angle / factor
    smooth = (before / wave - low) / (high - low)
    return (1 - smooth) * angle / factor + smooth * angle


class _Number(Protocol):
    def __call__(self, key: str) -> float: ...


def _yarn(plain: list[float], rope: Json, number: _Number) -> Rotation:
    stretch, before = number("factor"), number("original_max_position_embeddings")
    width, base = 2 * len(plain), number("rope_theta")

    def turning(turns: JsonValue) -> float:
        """Returns the index of the pair that turns this often within the original context."""
        if not isinstance(turns, int | float):
            raise TypeError("beta")
        return width * math.log(before / (turns * 2 * math.pi)) / (2 * math.log(base))

    def stretched(strength: float) -> float:
        return 1.0 if stretch <= 1 else 0.1 * strength * math.log(stretch) + 1

    low, high = turning(rope.get("beta_fast") or 32), turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    ramp = [min(max((index - low) / (high - low), 0), 1) for index in range(len(plain))]
    angles = tuple(angle / stretch * part + angle * (1 - part) for angle, part in zip(plain, ramp, strict=True))
    if "attention_factor" in rope:
        return Rotation(angles, number("attention_factor"))
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return Rotation(angles, stretched(number("mscale")) / stretched(number("mscale_all_dim")))
    return Rotation(angles, stretched(1))


def _ropes(network: object) -> Iterator[tuple[MutableMapping[str, object], str, _Rope]]:
    """Yields the modules that rotate, after the module and the name under which each is held."""
    for _, module in cast(_ModuleTree, network).named_modules():
        for name, child in list(module.items()):
            if type(child).__name__.endswith("RoPE") and isinstance(_dims(child), int):
                yield module, name, cast(_Rope, child)


def _dims(rope: object) -> object:
    return getattr(rope, "dims", None) or getattr(rope, "dim", None)


def _is_traditional(rope: _Rope) -> bool:
    """Whether the elements of a pair are neighbours, and not half a head apart."""
    return bool(getattr(rope, "traditional", False))


def _turned(rope: _Rope, position: int) -> list[tuple[float, float]]:
    """Returns the pairs (1, 1) after rotation to a position; none for a module that cannot compute it."""
    dims = cast(int, _dims(rope))
    try:
        row = cast(list[float], rope(mx.ones((1, 1, 1, dims)), position)[0, 0, 0].tolist())
    except TypeError:  # a class that was given no value for a setting
        return []
    half = dims // 2
    firsts, seconds = (row[::2], row[1::2]) if _is_traditional(rope) else (row[:half], row[half:])
    return list(zip(firsts, seconds, strict=True))


def _matches(rope: _Rope, wanted: Rotation) -> bool:
    if _dims(rope) != 2 * len(wanted.angles):
        return False
    if not _turned(rope, 1):
        return False
    turned = {position: _turned(rope, position) for position in _POSITIONS}
    for index, angle in enumerate(wanted.angles):
        position = max(each for each in turned if each == 1 or each * angle <= 1)
        first, second = turned[position][index]
        length, expected = math.hypot(first, second) / math.sqrt(2), angle * position
        measured = math.atan2(second, first) - math.pi / 4
        if abs(length - wanted.factor) > _TOLERANCE or abs(measured - expected) > _TOLERANCE * max(expected, 1e-4):
            return False
    return True


def _signature(rope: _Rope) -> tuple[object, ...]:
    return (_dims(rope), *((round(a, 3), round(b, 3)) for a, b in _turned(rope, 100)))


def _configured(wanted: Rotation, *, traditional: bool) -> object:
    """Makes a module of MLX that computes a rotation."""
    dims, factor = 2 * len(wanted.angles), wanted.factor
    periods = mx.array([1 / angle for angle in wanted.angles])

    class ConfiguredRoPE(import_module("mlx.nn").Module):
        def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
            if factor != 1:
                x = mx.concatenate([x[..., :dims] * factor, x[..., dims:]], axis=-1)
            return mx.fast.rope(x, dims, traditional=traditional, base=None, scale=1.0, offset=offset, freqs=periods)

    return ConfiguredRoPE()
