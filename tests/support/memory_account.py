"""A memory budget whose demands are met at once."""

import math
from dataclasses import dataclass, field

from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.supervisor.memory.budget import MemoryActions, MemoryBudget
from tests.support.random_reservations import CAPACITY


@dataclass(slots=True)
class Account:
    """A budget on which whatever it demands happens at once, and a clock that ticks with each event."""

    budget: MemoryBudget = field(default_factory=lambda: MemoryBudget(CAPACITY))
    now: float = 0.0
    granted: dict[str, LoadOption] = field(default_factory=dict[str, LoadOption])
    refused: list[str] = field(default_factory=list[str])
    unloaded: list[str] = field(default_factory=list[str])

    def settle(self) -> MemoryActions:
        self.now += 1
        actions = self.budget.settle(self.now)
        self.granted |= actions.granted
        for name in actions.refused:
            self.refused.append(name)
            self.budget.release(name)
        for name in actions.unload:
            self.unloaded.append(name)
            self.budget.release(name)
        return self.settle() if actions.unload else actions

    def ask(self, name: str, estimated: Estimated, *, pinned: bool = False, keep: float = math.inf) -> MemoryActions:
        self.budget.enter(name, self.now, pinned=pinned, keep=keep)
        self.budget.estimate(name, estimated)
        return self.settle()

    def load(self, name: str, estimated: Estimated, *, pinned: bool = False, keep: float = math.inf) -> None:
        self.ask(name, estimated, pinned=pinned, keep=keep)
        assert name in self.granted, f"{name} should have been let in"
        self.budget.loaded(name, self.now)

    def serve(self, name: str) -> None:
        self.now += 1
        self.budget.begin_use(name)
        self.budget.end_use(name, self.now)

    @property
    def names(self) -> list[str]:
        return [reservation.name for reservation in self.budget]
