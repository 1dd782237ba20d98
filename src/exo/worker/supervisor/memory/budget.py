"""The memory budget of all runners: reservations, the queue for memory, and evictions. Pure.

RAM and each device have an account of their own. Three invariants hold:

- The reservations on an account do not exceed its capacity, unless a runner takes more than its estimate.
- A pinned runner is never evicted, and one in use only after it has kept others waiting for the drain limit.
- Waiting runners get their memory in order of arrival. A later one may load first only if it fits beside the memory
  that all earlier ones wait for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.protocol.remote_host import host_of
from exo.worker.supervisor.memory.memory import UNKNOWN, Memory
from exo.worker.supervisor.memory.reservation import DoesNotFit, Reservation

ALTERNATING_SECONDS = 60.0
"""A model that is requested so soon after its eviction alternates with another one. Both then stay for a while."""


@dataclass(frozen=True, slots=True)
class MemoryActions:
    """The actions that are due now, by reservation name."""

    granted: dict[str, LoadOption]
    refused: dict[str, DoesNotFit]
    unload: tuple[str, ...]
    """End these: nobody uses them. Each is named once."""
    displace: tuple[str, ...] = ()
    """End these although they are in use: others have waited for the drain limit. Each is named once."""


@final
class MemoryBudget:
    """With ``capacity`` None nothing is counted and everything fits.

    ``residence`` is the time that a model stays loaded which alternates with another one, ``drain`` the time for which
    a runner's requests may keep others waiting for its memory; both in seconds.
    """

    def __init__(self, capacity: Memory | None = None, residence: float = 0.0, drain: float = math.inf) -> None:
        self.capacity = capacity
        self._residence = residence
        self._drain = drain
        self._settled = -math.inf
        self._evicted: dict[str, float] = {}  # the time of the last eviction, by kind
        self._reservations: dict[str, Reservation] = {}
        self._queue: list[Reservation] = []  # reservations that wait for memory, in order of arrival

    def need(self, option: LoadOption) -> Memory:
        """The memory that a load option takes."""
        return Memory(option.host, self._devices(option.devices, option.device))

    def _devices(self, named: Mapping[str, int], first: int) -> dict[str, int]:
        known = self.capacity.devices if self.capacity is not None else ()
        name = next((each for each in known if not host_of(each)), UNKNOWN)
        return {**named, name: named.get(name, 0) + first} if first else dict(named)

    @property
    def reserved(self) -> Memory:
        """All reservations together."""
        return sum((each.reserved for each in self), Memory())

    @property
    def free(self) -> Memory:
        """The memory without a reservation; negative where runners have taken more than their estimates."""
        assert self.capacity is not None
        return self.capacity - self.reserved

    @property
    def has_waiters(self) -> bool:
        """Whether a runner waits for memory."""
        return bool(self._queue)

    def reservation(self, name: str) -> Reservation | None:
        """For reading only."""
        return self._reservations.get(name)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._reservations.values())

    # --- events of a runner ---

    def enter(
        self,
        name: str,
        now: float,
        *,
        kind: str = "",
        pinned: bool = False,
        keep: float = math.inf,
        forced: bool = False,
    ) -> None:
        """Opens an empty reservation. Runners of the same model have the same ``kind``.

        A ``forced`` one that does not fit gets all memory that can be freed for it, instead of a refusal.
        """
        assert name not in self._reservations, f"{name} has a reservation"
        kind = kind or name
        returning = now - self._evicted.get(kind, -math.inf) < ALTERNATING_SECONDS or any(
            each.kind == kind and each.evicting is not None for each in self
        )
        self._reservations[name] = Reservation(name, pinned, keep, now, kind=kind, returning=returning, forced=forced)

    def estimate(self, name: str, estimated: Estimated) -> None:
        """A runner has sent its estimate; it joins the queue for memory."""
        reservation = self._reservations[name]
        reservation.change_state("waiting")
        reservation.estimated = estimated
        self._queue.append(reservation)

    def load(self, name: str) -> None:
        """A runner loads without an estimate."""
        self._reservations[name].change_state("loading")

    def reduce(self, name: str, option: LoadOption) -> None:
        """A runner that loads has taken a smaller option than the granted one."""
        self._reserve(self._reservations[name], option)

    def loaded(self, name: str, now: float) -> None:
        """A runner has loaded its model."""
        reservation = self._reservations[name]
        reservation.change_state("loaded")
        reservation.last_used = now
        if reservation.returning:
            reservation.stays_until = now + self._residence
        if reservation.evicting is not None:
            reservation.evicting = now  # the drain limit is for its requests, not for its load

    def measure(self, name: str, host: int, devices: Mapping[str, int] | None) -> None:
        """Replaces the estimate of a loaded runner by its measurement. ``devices`` is None if the driver cannot tell.

        The first measurement corrects the estimate either way. A later one only raises the reservation: memory that is
        free for the moment will be needed again. The accounts of other hosts keep their estimate.
        """
        reservation = self._reservations[name]
        assert reservation.state == "loaded"
        first = reservation.measured is None
        before = reservation.reserved - reservation.later if reservation.measured is None else reservation.measured
        if devices is not None:
            known = {"", *map(host_of, devices)}
            elsewhere = {name: size for name, size in before.devices.items() if host_of(name) not in known}
            devices = {**elsewhere, **devices}
        taken = Memory(host, before.devices if devices is None else devices)
        reservation.reserved = taken + reservation.later if first else reservation.reserved.at_least(taken)
        reservation.measured = taken

    def begin_use(self, name: str) -> None:
        """A request needs a runner."""
        self._reservations[name].users += 1
        self._reservations[name].abandoned = False

    def end_use(self, name: str, now: float) -> None:
        """A request is done with a runner, which may be gone."""
        if (reservation := self._reservations.get(name)) is not None:
            reservation.users -= 1
            reservation.last_used = now
            unloaded = reservation.state in ("asking", "waiting")
            reservation.abandoned = reservation.users == 0 and unloaded and not reservation.pinned

    def keep(self, name: str, seconds: float) -> None:
        """Sets how long a runner stays loaded without being used."""
        self._reservations[name].keep = seconds

    def dismiss(self, name: str) -> None:
        """Ends a runner as soon as it is idle."""
        self._reservations[name].dismissed = True

    def release(self, name: str) -> None:
        """A runner has ended."""
        reservation = self._reservations.pop(name)
        if reservation in self._queue:
            self._queue.remove(reservation)

    # --- decisions ---

    def next_expiry(self) -> float:
        """The time at which ``settle`` may decide differently without any event; infinity for never."""
        times = [each.expires for each in self]
        times += [each.evicting + self._drain for each in self if each.drains and each.evicting is not None]
        if self._queue:
            times += [each.stays_until for each in self if each.stays_until > self._settled]
        return min(times, default=math.inf)

    def settle(self, now: float) -> MemoryActions:
        """Decides what to do. Call it after every change, and at ``next_expiry``.

        Evictions are decided anew on each call, from the queue as it is: a victim that has not been told to end stays
        if its memory is no longer needed, because the waiter has left or other memory has become free. ``before``
        carries the time since when each victim has been one, so that starting over does not restart the drain limit.
        """
        self._settled = now
        before = {each.name: each.evicting for each in self if each.evicting is not None}
        for each in self:
            each.dismissed = each.dismissed or each.expires <= now
            each.evicting = each.evicting if each.ending else None
        granted: dict[str, LoadOption] = {}
        refused: dict[str, DoesNotFit] = {}
        # Memory that earlier waiters need. Later ones may not take it, or a large model would wait behind small ones
        # for ever. Only the first waiter evicts: the next one may fit once that has its memory.
        ahead, first = Memory(), True
        for waiter in tuple(self._queue):
            assert waiter.estimated is not None
            option, wanted = self._fitting(waiter.estimated, ahead), self._attainable(waiter.estimated)
            if option is None and waiter.abandoned:
                # The model may be wanted again, so it would take free memory, but it evicts no other.
                waiter.dismissed = True
                self._queue.remove(waiter)
                continue
            if option is None and wanted is None and waiter.forced:
                waiter.too_large = self._refusal(waiter.estimated)
                wanted = self._cut(waiter.estimated.choices[-1])
                waiter.estimated = Estimated(choices=(wanted,))
                option = self._fitting(waiter.estimated, ahead)
            if option is None and wanted is None:
                refused[waiter.name] = self._refusal(waiter.estimated)
                self._queue.remove(waiter)
                continue
            if option is None and first:
                option = self._make_room(waiter.estimated, now, before)
            if option is not None:
                granted[waiter.name] = option
                self._grant(waiter, option)
            elif wanted is not None:
                ahead += self.need(wanted)
                first = False
        unload = [each for each in self if each.leaving and each.idle and not each.ending]
        displace = [
            each for each in self if each.drains and each.evicting is not None and each.evicting + self._drain <= now
        ]
        for each in (*unload, *displace):
            each.ending = True
            if each.evicting is not None and not each.dismissed:
                self._evicted[each.kind] = now
        return MemoryActions(
            granted, refused, tuple(each.name for each in unload), tuple(each.name for each in displace)
        )

    def _grant(self, waiter: Reservation, option: LoadOption) -> None:
        self._queue.remove(waiter)
        waiter.change_state("loading")
        self._reserve(waiter, option)

    def _reserve(self, reservation: Reservation, option: LoadOption) -> None:
        reservation.reserved = self.need(option)
        reservation.later = Memory(option.later_host, self._devices(option.later_devices, option.later_device))

    def _cut(self, option: LoadOption) -> LoadOption:
        """The option with all the memory that can be freed, where it needs more."""
        need, most = self.need(option), self._most()
        devices = {name: min(size, max(0, most.devices.get(name, 0))) for name, size in need.devices.items()}
        sizes = {"host": min(need.host, max(0, most.host)), "device": 0, "devices": devices}
        return option.model_copy(update={**sizes, "later_host": 0, "later_device": 0, "later_devices": {}})

    def _fitting(self, estimated: Estimated, ahead: Memory) -> LoadOption | None:
        """The best option down to those as good as ``enough`` that fits into the free memory, less ``ahead``."""
        if self.capacity is None:
            return estimated.choices[0]
        room = self.free - ahead
        least = estimated.enough + estimated.as_good
        return next((each for each in estimated.choices[: least + 1] if self.need(each).fits(room)), None)

    def _attainable(self, estimated: Estimated) -> LoadOption | None:
        """The best option from ``enough`` on that would fit without all unpinned runners."""
        if self.capacity is None:
            return estimated.choices[0]
        most = self._most()
        return next((each for each in estimated.choices[estimated.enough :] if self.need(each).fits(most)), None)

    def _most(self) -> Memory:
        """The memory that would be free without all unpinned runners."""
        assert self.capacity is not None
        return self.capacity - sum((each.reserved for each in self if each.pinned and not each.dismissed), Memory())

    def _refusal(self, estimated: Estimated) -> DoesNotFit:
        most = self._most()
        changes: dict[tuple[str, ...], LoadOption] = {}
        for each in estimated.remedies:
            if self.need(each).fits(most):
                changes.setdefault(tuple(each.settings), each)
        return DoesNotFit(self.need(estimated.choices[-1]), most, tuple(changes.values()))

    def _make_room(self, estimated: Estimated, now: float, before: Mapping[str, float]) -> LoadOption | None:
        """Marks victims for the first waiter. If an acceptable option fits without any, marks none and returns it.

        Order of preference: a set of idle runners for any acceptable option comes before a set with busy ones, because
        idle ones end at once and lose nothing. Among equals the least recently used goes first. But earlier victims
        go before all others: a busy victim whose last request ends would otherwise look recently used, and its eviction
        would start over with another one.
        """
        acceptable = estimated.choices[estimated.enough :]
        going = [each for each in self if each.leaving]
        free, coming = self.free, sum((each.reserved for each in going), Memory())
        # A returning model keeps its memory while it loads and for its residence: two models that alternate would
        # otherwise spend all their time loading.
        victims = [
            each
            for each in self
            if not (each.leaving or each.pinned or each.reserved == Memory())
            and each.stays_until <= now
            and not (each.returning and each.state == "loading")
        ]
        victims.sort(key=lambda each: (each.name not in before, each.last_used))
        idle = [each for each in victims if each.idle]
        busy = [each for each in victims if not each.idle]
        for candidates in (idle, [*idle, *busy]):
            for option in acceptable:
                if self.need(option).fits(free):
                    return option
                chosen = _fewest(self.need(option), free + coming, candidates)
                if chosen is not None:
                    for each in (*chosen, *going):  # the ones going are waited for, too: their drain limit runs
                        each.evicting = before.get(each.name, now)
                    return None
        return None


def _fewest(needed: Memory, room: Memory, candidates: Sequence[Reservation]) -> list[Reservation] | None:
    """Returns the first candidates that together free enough memory; None if even all of them do not.

    The second pass spares candidates that turn out unnecessary, such as one that freed the wrong device.
    """
    chosen: list[Reservation] = []
    for each in candidates:
        if needed.fits(room):
            break
        chosen.append(each)
        room += each.reserved
    if not needed.fits(room):
        return None
    for each in chosen[::-1]:
        if needed.fits(room - each.reserved):
            chosen.remove(each)
            room -= each.reserved
    return chosen
