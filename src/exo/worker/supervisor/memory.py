"""An amount of memory: the processors' and each device's, which cannot stand in for one another."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

HOST = "memory"
"""The account of the processors' memory."""
UNKNOWN = "a device"
"""The account of a device on a machine of which none is known."""


@final
@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the processors' memory, and of devices by name; of one that is not named, 0."""

    host: int = 0
    devices: Mapping[str, int] = field(default_factory=dict[str, int])

    def __add__(self, other: "Memory") -> "Memory":
        return self._with(other, operator.add)

    def __sub__(self, other: "Memory") -> "Memory":
        return self._with(other, operator.sub)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Memory) and self.by_account() == other.by_account()

    def __hash__(self) -> int:
        return hash(frozenset(self.by_account().items()))

    @property
    def device(self) -> int:
        """Of all devices together."""
        return sum(self.devices.values())

    def by_account(self) -> dict[str, int]:
        """What there is of each kind, the processors' under ``HOST``; nothing is left out."""
        sizes = {HOST: self.host, **self.devices}
        return {name: size for name, size in sizes.items() if size}

    def fits(self, room: "Memory") -> bool:
        """Whether there is room for it; what takes nothing of a kind fits even where too much of it is taken."""
        return not self.beyond(room)

    def beyond(self, room: "Memory") -> list[tuple[str, int, int]]:
        """Of each kind that there is too little of: its name, what is needed and what there is."""
        there = room.by_account()
        sizes = [(name, size, max(0, there.get(name, 0))) for name, size in self.by_account().items()]
        return [each for each in sizes if each[1] > each[2]]

    def at_least(self, other: "Memory") -> "Memory":
        """The larger of both, each kind by itself."""
        return self._with(other, max)

    def _with(self, other: "Memory", combine: Callable[[int, int], int]) -> "Memory":
        names = dict.fromkeys((*self.devices, *other.devices))
        devices = {name: combine(self.devices.get(name, 0), other.devices.get(name, 0)) for name in names}
        return Memory(combine(self.host, other.host), devices)
