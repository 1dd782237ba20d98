"""How fast a runner was with a model, by how many sequences it had at once. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from exo.worker.protocol.runners import Prefer

TYPICAL_TOKENS = 100
"""Output tokens of the request whose duration stands for latency."""
_SMOOTHING = 0.2
"""What a measurement of weight 1 counts for beside all that was measured before it."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One request, from its arrival at the runner to its last token. Rates are in output tokens a second.

    All are above 0.
    """

    load: float
    """Sequences that the runner had at once, this one included: the mean over the request's time, at least 1."""
    first: float
    """Seconds to its first token."""
    stream: float
    """Its own rate after that."""
    total: float
    """The rate of all the runner's sequences together, over the request's time."""

    @property
    def weight(self) -> float:
        """What it counts for: one, shared by all the sequences of such a load."""
        return 1 / level(self.load)


Positive = Annotated[float, Field(gt=0)]


class Point(BaseModel):
    """What was measured at about one load, smoothed. ``first``, ``stream`` and ``total`` as in ``Measurement``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    first: Positive
    stream: Positive
    total: Positive
    count: Positive
    """How often it was measured, where the sequences of one load count for one."""
    at: float
    """When it was measured last, in seconds since 1970."""

    def figure(self, prefer: Prefer) -> float:
        """What is compared: for latency the seconds that ``TYPICAL_TOKENS`` take, for throughput tokens a second."""
        return self.total if prefer == "throughput" else self.first + (TYPICAL_TOKENS - 1) / self.stream

    def take(self, measured: Measurement, now: float) -> "Point":
        """With one measurement more: an exponentially weighted mean, which begins as a plain one."""
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
        """The first one."""
        weight = measured.weight
        return cls(first=measured.first, stream=measured.stream, total=measured.total, count=weight, at=now)


Speed = Mapping[int, Point]
"""Of one runner with one model: points by load, which is a power of two."""


def level(load: float) -> int:
    """The power of two that a load counts for: the nearest on a logarithmic scale."""
    return 1 << max(0, round(math.log2(load)))


def figure_at(speed: Speed, load: float, prefer: Prefer) -> float:
    """The figure between the points around ``load``, linear in its logarithm, or of the nearest point beyond them."""
    below = max((each for each in speed if each <= load), default=min(speed))
    above = min((each for each in speed if each >= load), default=max(speed))
    low, high = speed[below].figure(prefer), speed[above].figure(prefer)
    if below >= above:
        return high if load > above else low
    return low + (high - low) * math.log2(load / below) / math.log2(above / below)
