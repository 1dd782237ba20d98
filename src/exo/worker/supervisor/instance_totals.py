"""Totals of all instances of a model with one runner and backend since the server started."""

from dataclasses import dataclass, field

from exo.worker.protocol.events import PrefixUse


@dataclass(slots=True)
class InstanceTotals:
    """Counts that only grow."""

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
