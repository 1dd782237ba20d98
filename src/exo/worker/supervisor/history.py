"""What the instances of each model and place have done since the server started: their totals and their failures."""

import random
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import final

import anyio

from exo.cards.card import ModelCard
from exo.worker.protocol.events import Failed, PrefixUse
from exo.worker.supervisor.circuit_breaker import CircuitBreaker
from exo.worker.supervisor.instance import Kind, RunnerInstance, settings_digest


@dataclass(slots=True)
class InstanceTotals:
    """Counts that only grow, of all instances of a model with one runner and backend."""

    loads: int = 0
    load_seconds: float = 0.0
    """From the start of the process until it could serve, the wait for memory included."""
    deaths: int = 0
    """Processes that failed, those that could not load included."""
    evictions: int = 0
    """Instances that had to end because another model needed their memory."""
    prefixes: dict[str, int] = field(default_factory=dict[str, int])
    """Prompts of ended processes that found a prefix, by tier."""

    def note_load(self, seconds: float) -> None:
        """A process can serve."""
        self.loads += 1
        self.load_seconds += seconds

    def note_prefixes(self, use: PrefixUse) -> None:
        """A process has ended."""
        for tier, hits in prefix_hits(use).items():
            self.prefixes[tier] = self.prefixes.get(tier, 0) + hits


def prefix_hits(use: PrefixUse) -> dict[str, int]:
    """Prompts that found a prefix, by the tier that had it."""
    return {"slot": use.from_slots, "ram": use.from_ram, "disk": use.from_disk}


@final
class RunnerHistory:
    """The only writer of the circuit breakers."""

    def __init__(self) -> None:
        self.totals: defaultdict[tuple[str, str, str], InstanceTotals] = defaultdict(InstanceTotals)
        self.breakers: defaultdict[Kind, CircuitBreaker] = defaultdict(CircuitBreaker)
        self._last_failed: dict[tuple[str, str], RunnerInstance] = {}  # by model id and place

    def check_pause(self, kind: Kind) -> None:
        """Raises ``RunnerError`` if no process of this kind may start now, after too many failures."""
        self.breakers[kind].check_pause(*kind[:2], anyio.current_time())

    def worked(self, instance: RunnerInstance) -> None:
        """An instance has computed a token."""
        self.breakers[instance.kind].worked()
        self._last_failed.pop(instance.kind[:2], None)

    def ended(self, instance: RunnerInstance, failed: Failed) -> None:
        """The process of an instance has ended, perhaps because it failed."""
        process, breaker = instance.process, self.breakers[instance.kind]
        if process.produced_output.is_set():  # ``worked`` may not have been called yet
            breaker.worked()
        if failed.code != "shutdown" and not process.refused and not process.displaced:
            self._last_failed[instance.kind[:2]] = instance
            self.totals[instance.labels].deaths += 1
            lasting = process.capabilities is None and failed.code != "runner_died"  # it stated why it cannot load
            breaker.failed(failed, anyio.current_time(), random.random(), lasting=lasting)

    def avoided(self, card: ModelCard) -> dict[str, Failed]:
        """The places where runners keep failing with this version of the card, and the last failures."""
        now = anyio.current_time()
        return {
            where: each.last
            for (model_id, where, settings), each in self.breakers.items()
            if model_id == card.model_id and each.failures and each.last is not None and each.avoided(now)
            if settings == settings_digest(card, where.partition("@")[0])
        }

    def failed_before(self, instances: Collection[RunnerInstance]) -> list[RunnerInstance]:
        """The last failed instance of each model and place that has not worked since and is not among ``instances``."""
        there = {each.kind[:2] for each in instances}
        return [each for which, each in self._last_failed.items() if which not in there]

    def forget(self, model_id: str, runner: str | None) -> None:
        """Forgets the failed instances of a model, or those with one runner."""
        for which in [each for each in self._last_failed if each[0] == model_id and runner in (None, each[1])]:
            del self._last_failed[which]
