"""An amount of memory: RAM and each device's, which cannot replace one another."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

HOST = "memory"
"""The name of the RAM's account."""
UNKNOWN = "a device"
"""The name of the device's account on a machine without known devices."""


@final
@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of RAM, and of devices by name. A device that is not named has 0."""

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
        """All devices together."""
        return sum(self.devices.values())

    def by_account(self) -> dict[str, int]:
        """Bytes by account, without the empty ones."""
        return {name: size for name, size in {HOST: self.host, **self.devices}.items() if size}

    def fits(self, room: "Memory") -> bool:
        """Whether ``room`` suffices. An account of which nothing is needed may be overdrawn."""
        return not self.beyond(room)

    def beyond(self, room: "Memory") -> list[tuple[str, int, int]]:
        """For each account without enough room: its name, the bytes needed and the bytes there."""
        there = room.by_account()
        sizes = [(name, size, max(0, there.get(name, 0))) for name, size in self.by_account().items()]
        return [each for each in sizes if each[1] > each[2]]

    def at_least(self, other: "Memory") -> "Memory":
        """The larger of both on each account."""
        return self._with(other, max)

    def _with(self, other: "Memory", combine: Callable[[int, int], int]) -> "Memory":
        names = dict.fromkeys((*self.devices, *other.devices))
        devices = {name: combine(self.devices.get(name, 0), other.devices.get(name, 0)) for name in names}
        return Memory(combine(self.host, other.host), devices)
