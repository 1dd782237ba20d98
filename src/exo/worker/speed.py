"""Choice by measured speed: among the runners that have loaded a model, the fastest at the current load. Pure.

A load is the number of sequences that a runner computes at once. Rates are in output tokens a second.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from exo.worker.protocol.runners import Prefer

TYPICAL_TOKENS = 100
"""Output tokens of the request whose duration stands for latency."""
_SMOOTHING = 0.2
"""The least share of a new measurement of weight 1 in the mean."""
NEEDED = 3
"""Measurements, as ``Point.count`` counts them, that a runner needs at a load before it is compared there."""
MARGIN = 0.1
"""How much faster another runner must be to take over. Without a margin, near equals would alternate."""
_BLOCK = 2 * NEEDED
"""Trial requests, times the load, that an unmeasured runner gets. Not every trial ends in a measurement."""
_SPACING = 16
"""A runner that is still unmeasured gets another block of trials every 16 blocks of requests."""

Basis = Literal["order", "trial", "figures"]
"""Why a runner was chosen: by the card's order, to measure it, or by its measurements."""
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One request, from its arrival at the runner to its last token. All values are above 0."""

    load: float  # mean over the request's time, this request included, so at least 1
    first: float  # seconds to its first token
    stream: float  # its own rate after that
    total: float  # rate of all the runner's sequences together during the request

    @property
    def weight(self) -> float:
        """The sequences of one load weigh one together."""
        return 1 / level(self.load)


class Point(BaseModel):
    """The smoothed measurements at one load. ``first``, ``stream`` and ``total`` are as in ``Measurement``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    first: Positive
    stream: Positive
    total: Positive
    count: Positive  # the sum of the measurements' weights
    at: float  # time of the last measurement, in seconds since 1970

    def figure(self, prefer: Prefer) -> float:
        """The compared value. For latency: seconds for ``TYPICAL_TOKENS``. For throughput: tokens a second."""
        return self.total if prefer == "throughput" else self.first + (TYPICAL_TOKENS - 1) / self.stream

    def take(self, measured: Measurement, now: float) -> "Point":
        """Adds a measurement. The result is an exponentially weighted mean, which begins as a plain one."""
        weight = measured.weight
        share = max(weight / (self.count + weight), _SMOOTHING * weight)
        return Point(
            first=self.first + share * (measured.first - self.first),
            stream=self.stream + share * (measured.stream - self.stream),
            total=self.total + share * (measured.total - self.total),
            count=self.count + weight,
            at=now,
        )

    @classmethod
    def of(cls, measured: Measurement, now: float) -> "Point":
        """The point of a first measurement."""
        count = measured.weight
        return cls(first=measured.first, stream=measured.stream, total=measured.total, count=count, at=now)


Speed = Mapping[int, Point]
"""One runner's points with one model, by load, which is a power of two."""


def level(load: float) -> int:
    """The power of two nearest to a load on a logarithmic scale."""
    return 1 << max(0, round(math.log2(load)))


def figure_at(speed: Speed, load: float, prefer: Prefer) -> float:
    """The figure at ``load``: linear in its logarithm between two points, constant beyond the outer ones."""
    below = max((each for each in speed if each <= load), default=min(speed))
    above = min((each for each in speed if each >= load), default=max(speed))
    low, high = speed[below].figure(prefer), speed[above].figure(prefer)
    if below >= above:
        return high if load > above else low
    return low + (high - low) * math.log2(load / below) / math.log2(above / below)


@dataclass(frozen=True, slots=True)
class Preference:
    """Everything that a choice by speed depends on. Mappings are by runner name."""

    prefer: Prefer
    load: int
    """Sequences of the model at once, the new request's included."""
    speeds: Mapping[str, Speed]
    """Recent points with enough measurements."""
    sent: Mapping[str, int]
    """Requests sent at about this load since the server started."""
    incumbent: str | None = None
    """The runner chosen the last time that measurements decided."""


@dataclass(frozen=True, slots=True)
class Pick:
    """The chosen runner, or None to follow the card's order. ``why`` is a clause in printable ASCII."""

    runner: str | None
    basis: Basis
    why: str


def pick(loaded: Sequence[str], preference: Preference) -> Pick:
    """Chooses among ``loaded``, the runners that can serve the request at once, in the card's order."""
    prefix = f"prefer {preference.prefer}"
    if len(loaded) < 2:
        return Pick(None, "order", f"{prefix} has a choice once several runners have loaded the model")
    if (untried := next((each for each in loaded if _needs_trial(each, loaded, preference)), None)) is not None:
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
    """``figures`` are in the card's order. The incumbent stays unless another is faster by the margin."""
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


def _needs_trial(runner: str, loaded: Sequence[str], preference: Preference) -> bool:
    """Whether a runner has no figure at this load and has trials left."""
    at, speed = level(preference.load), preference.speeds.get(runner, {})
    if speed and min(speed) <= at <= max(speed):
        return False
    block = _BLOCK * at
    everyone = sum(preference.sent.get(each, 0) for each in loaded)
    return preference.sent.get(runner, 0) < block * (1 + everyone // (_SPACING * block))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
