"""Random lives of many models, against a plain model of what the memory budget must hold."""

import math
from collections.abc import Callable

from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.memory.reservation import Reservation

CAPACITY = Memory(100, {"CUDA0": 50, "CUDA1": 30})


def takes(host: int, device: int = 0, *, later_host: int = 0, later_device: int = 0, **devices: int) -> Estimated:
    choice = LoadOption(host=host, device=device, devices=devices, later_host=later_host, later_device=later_device)
    return Estimated(choices=(choice,))


EVENTS = ("load", "load", "loaded", "measured", "request", "request", "answered", "answered", "stop", "death", "end")


class Lives:
    """Lives of models. What is demanded of a runner happens some events later, or it dies before."""

    def __init__(self) -> None:
        self.budget = MemoryBudget(CAPACITY)
        self.now = 0.0
        self.born = 0
        self.told: list[str] = []
        """Runners that have been told to end."""

    def happens(self, event: str, number: int) -> None:
        """One event; ``number`` decides of which runner, and whatever else is open."""
        match event:
            case "load":
                self.born += 1
                pinned = number % 11 == 0 and not any(each.pinned for each in self.budget)
                keep = 3.0 if number % 5 == 0 and not pinned else math.inf
                self.budget.enter(f"model-{self.born}", self.now, pinned=pinned, keep=keep, forced=number % 7 == 0)
                self.budget.estimate(f"model-{self.born}", self.wants(number))
            case "loaded":
                self.each(number, "loading", lambda reservation: self.budget.loaded(reservation.name, self.now))
            case "measured":
                self.each(number, "loaded", lambda reservation: self.measure(reservation, number))
            case "request":
                found = [each for each in self.budget if not each.leaving]
                if found:
                    self.budget.begin_use(found[number % len(found)].name)
            case "answered":
                found = [each for each in self.budget if each.users]
                if found:
                    self.budget.end_use(found[number % len(found)].name, self.now)
            case "stop":
                self.each(number, "loaded", lambda reservation: self.budget.dismiss(reservation.name))
            case "death":
                self.any(number, self.release)
            case _:
                if self.told:
                    self.budget.release(self.told.pop(number % len(self.told)))
        self.settle()

    def wants(self, number: int) -> Estimated:
        """Of the processors' memory and of one device, of both, or of none."""
        host, device = number % 97 + 1, number // 97 % 41
        match number % 4:
            case 0:
                return takes(host, device)
            case 1:
                return takes(host, CUDA1=min(device, 30))
            case 2:
                return takes(host, CUDA0=device, CUDA1=device // 2)
            case _:
                return takes(host)

    def each(self, number: int, state: str, act: Callable[[Reservation], None]) -> None:
        found = [each for each in self.budget if each.state == state]
        if found:
            act(found[number % len(found)])

    def any(self, number: int, act: Callable[[Reservation], None]) -> None:
        found = list(self.budget)
        if found:
            act(found[number % len(found)])

    def measure(self, reservation: Reservation, number: int) -> None:
        share = (50 + number % 51) / 100
        devices = {name: int(size * share) for name, size in reservation.reserved.devices.items()}
        self.budget.measure(reservation.name, int(reservation.reserved.host * share), devices)

    def release(self, reservation: Reservation) -> None:
        if reservation.name in self.told:
            self.told.remove(reservation.name)
        self.budget.release(reservation.name)

    def settle(self) -> None:
        self.now += 1
        stayed = {each.name for each in self.budget if not each.leaving}
        actions = self.budget.settle(self.now)
        for name in actions.unload:
            reservation = self.budget.reservation(name)
            assert reservation is not None
            assert reservation.users == 0
            assert reservation.state == "loaded" or reservation.abandoned
            assert name not in self.told, "a runner is told to end once"
            self.told.append(name)
        for name in actions.refused:
            self.budget.release(name)
        self.check_sent_away(stayed)
        self.check_line()
        for name, size in self.budget.reserved.by_account().items():
            assert 0 <= size <= CAPACITY.by_account()[name], f"too much {name} is given"
        held = sum((each.reserved for each in self.budget if each.state in ("loading", "loaded")), Memory())
        assert held == self.budget.reserved, "who waits holds nothing"

    def check_sent_away(self, stayed: set[str]) -> None:
        """Of those that leave from now on to make room, each is needed, and none is pinned."""
        sent = [
            each
            for each in self.budget
            if each.leaving and each.name in stayed and each.keep == math.inf and not each.abandoned
        ]
        if not sent:
            return
        assert not any(each.pinned for each in sent)
        coming = self.budget.free + sum((each.reserved for each in self.budget if each.leaving), Memory())
        first = next(each for each in self.budget if each.state == "waiting" and not each.leaving)
        assert first.estimated is not None
        needed = self.budget.need(first.estimated.choices[0])
        for each in sent:
            assert not needed.fits(coming - each.reserved), f"{each.name} was sent away without need"

    def check_line(self) -> None:
        """The first in line will fit once those that leave have left, so that nobody waits for nothing."""
        first = next((each for each in self.budget if each.state == "waiting" and not each.leaving), None)
        if first is not None and first.estimated is not None:
            leaving = sum((each.reserved for each in self.budget if each.leaving), Memory())
            assert self.budget.need(first.estimated.choices[0]).fits(self.budget.free + leaving)

    def end(self) -> None:
        """All requests end and all loads succeed, so everybody in line gets its turn; then everything is given back."""
        for _ in range(3 * self.born + 3):
            for reservation in list(self.budget):
                while reservation.users:
                    self.budget.end_use(reservation.name, self.now)
                if reservation.state == "loading":
                    self.budget.loaded(reservation.name, self.now)
            self.settle()
            for name in self.told:
                self.budget.release(name)
            self.told.clear()
        assert all(each.state == "loaded" for each in self.budget), "somebody waits for ever"
        for reservation in list(self.budget):
            self.budget.release(reservation.name)
        assert self.budget.reserved == Memory()
