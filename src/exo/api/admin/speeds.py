"""The measured speeds of runners in the form of the API."""

import time
from typing import Self

from pydantic import BaseModel

from exo.cards.card import ModelCard
from exo.worker.speed import Point
from exo.worker.supervisor.speed_store import SpeedStore


class SpeedAtLoad(BaseModel):
    """The recent speed of a runner with a model. Rates are in output tokens per second."""

    runner: str
    load: int
    """The approximate number of simultaneous sequences."""
    count: float
    """The number of measurements. Simultaneous sequences count as one."""
    first_token_seconds: float
    tokens_per_second: float
    """The rate of each sequence after its first token."""
    total_tokens_per_second: float
    """The rate of all sequences together."""

    @classmethod
    def of(cls, runner: str, load: int, point: Point) -> Self:
        """The form of the API."""
        return cls(
            runner=runner,
            load=load,
            count=round(point.count, 2),
            first_token_seconds=round(point.first, 4),
            tokens_per_second=round(point.stream, 2),
            total_tokens_per_second=round(point.total, 2),
        )

    def __str__(self) -> str:
        return (
            f"{self.runner}, {self.load} at once: {self.first_token_seconds:g} s to the first token,"
            f" then {self.tokens_per_second:g} tokens/s each, {self.total_tokens_per_second:g} tokens/s in all"
            f" (measured {self.count:g} times)"
        )


def known_speeds(speeds: SpeedStore, card: ModelCard) -> list[SpeedAtLoad]:
    """The known speeds of a model, by runner and load."""
    known = speeds.known(card, time.time())
    return [SpeedAtLoad.of(runner, load, point) for runner, speed in known.items() for load, point in speed.items()]
