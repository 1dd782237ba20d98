"""Choice by load: of the runners that have a model loaded, the one that measured faster at so many requests. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from exo.worker.protocol.runners import Prefer
from exo.worker.speed import TYPICAL_TOKENS, Speed, figure_at, level

NEEDED = 3
"""How often a runner must have been measured at a load, as ``Point.count`` counts."""
MARGIN = 0.1
"""By how much another runner must be faster to take over, so that what is almost the same does not alternate."""
_BLOCK = 2 * NEEDED
"""Requests, times the load, that a runner is tried with so that it gets measured, ..."""
_SPACING = 16
"""... and again once there have been so many times as many: not all tries end in a measurement."""

Basis = Literal["order", "trial", "figures"]
"""Why a runner was taken: the card's order, because it lacks measurements, or by measurements."""


@dataclass(frozen=True, slots=True)
class Preference:
    """What is preferred, and all that the choice depends on."""

    prefer: Prefer
    load: int
    """Sequences of the model at once, those of the request included."""
    speeds: Mapping[str, Speed]
    """By runner: the points that were measured often enough, and not too long ago."""
    sent: Mapping[str, int]
    """By runner: requests that were sent to it at about this load since the server started."""
    incumbent: str | None = None
    """The runner that was taken the last time that measurements decided."""


@dataclass(frozen=True, slots=True)
class Pick:
    """The runner to take, or None to go by the card's order; ``why`` is a clause in printable ASCII."""

    runner: str | None
    basis: Basis
    why: str


def pick(loaded: Sequence[str], preference: Preference) -> Pick:
    """``loaded`` are the runners that can serve the request at once, in the card's order."""
    prefix = f"prefer {preference.prefer}"
    if len(loaded) < 2:
        return Pick(None, "order", f"{prefix} has a choice once several runners have loaded the model")
    if (untried := next((each for each in loaded if _to_be_tried(each, loaded, preference)), None)) is not None:
        why = f"{prefix}: too little is measured of {untried} with {preference.load} at once"
        return Pick(untried, "trial", why)
    speeds = {runner: preference.speeds.get(runner, {}) for runner in loaded}
    unknown = [runner for runner, speed in speeds.items() if not speed]
    least = max((min(speed) for speed in speeds.values() if speed), default=1)
    most = min((max(speed) for speed in speeds.values() if speed), default=1)
    if unknown or least > most:
        return Pick(None, "order", f"{prefix} has too few measurements of {_listed(unknown or loaded)}")
    load = min(max(preference.load, least), most)
    figures = {runner: figure_at(speed, load, preference.prefer) for runner, speed in speeds.items()}
    return _fastest(figures, load, preference)


def _fastest(figures: Mapping[str, float], load: int, preference: Preference) -> Pick:
    """``figures`` of all runners in the card's order; the incumbent stays unless another is faster by a margin."""
    latency = preference.prefer == "latency"
    ranked = sorted(figures, key=lambda each: figures[each] if latency else -figures[each])
    best = ranked[0]
    incumbent = next((each for each in figures if each == preference.incumbent), next(iter(figures)))
    low, high = sorted((figures[incumbent], figures[best]))
    if latency:
        parts = [f"{_number(figures[each])} s with {each}" for each in ranked]
        measured = f"{TYPICAL_TOKENS} tokens took {_listed(parts)}"
    else:
        parts = [f"{each} {_number(figures[each])}" for each in ranked[1:]]
        measured = _listed([f"{best} made {_number(figures[best])} tokens/s", *parts])
    nearest = "" if load == preference.load else f" (the nearest measured to {preference.load})"
    why = f"prefer {preference.prefer}: of {load} at once{nearest}, {measured}"
    if best != incumbent and high <= low * (1 + MARGIN):
        return Pick(incumbent, "figures", f"{why}, too close to leave {incumbent}")
    return Pick(best, "figures", why)


def _to_be_tried(runner: str, loaded: Sequence[str], preference: Preference) -> bool:
    """Where no figure can be told, and some tries are left."""
    at, speed = level(preference.load), preference.speeds.get(runner, {})
    if speed and min(speed) <= at <= max(speed):
        return False
    block = _BLOCK * at
    everyone = sum(preference.sent.get(each, 0) for each in loaded)
    return preference.sent.get(runner, 0) < block * (1 + everyone // (_SPACING * block))


def _number(value: float) -> str:
    """Three digits, or more before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
