"""The accounts of memory for all runners: what each has reserved, who waits for how much, and who has to go. Pure.

There is one account of the processors' memory and one of each device's. What holds: what is reserved on each is at most
its capacity, but where a runner turns out to take more than its estimate; a pinned runner is never told to end, and one
in use only when it has made others wait for the drain limit; and whoever waits gets its memory in the order of arrival,
unless a later one fits beside all that came before it.

An eviction is decided anew each time: a runner that was to make room and is not idle yet stays if the room is no longer
needed, because whoever waited has left or other memory has become free.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from pydantic_core import to_json

from exo.worker.protocol.messages import Estimated, LoadOption
from exo.worker.supervisor.memory import HOST, UNKNOWN, Memory


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """Why a model cannot be loaded. ``room`` is what all that may be unloaded would leave free."""

    needed: Memory
    room: Memory
    remedies: tuple[LoadOption, ...]
    """Of each setting, the smallest change that would make it fit."""

    def message(self, model_id: str, runner: str) -> str:
        """For whoever asked for the model."""
        short = [
            f"{needed:,} bytes of {'memory' if name == HOST else f'memory on {name}'}, "
            f"and at most {room:,} can be freed for it"
            for name, needed, room in self.needed.beyond(self.room)
        ]
        text = f"{model_id} needs {' and '.join(short)} here"
        if not self.remedies:
            return f"{text}; no setting of [{runner}] in its card would make it fit"
        ways = (
            " and ".join(f"{key} = {to_json(value).decode()}" for key, value in each.settings.items())
            for each in self.remedies
        )
        return f"{text}; with {', or '.join(ways)} in [{runner}] of its card it would fit"


ALTERNATING_SECONDS = 60.0
"""A model that is wanted again so soon after its eviction takes turns with another: then both stay for a while."""


@dataclass(frozen=True, slots=True)
class MemoryActions:
    """What is to be done now. Names are those of ``enter``."""

    granted: dict[str, LoadOption]
    refused: dict[str, DoesNotFit]
    unload: tuple[str, ...]
    """To be ended now: nobody uses them. Each is named once."""
    displace: tuple[str, ...] = ()
    """To be ended now although they are used: others have waited for them long enough. Each is named once."""


State = Literal["asking", "waiting", "loading", "loaded"]
"""Of an entry: until its estimate is known, until it has its memory, until it has loaded, and then."""


@dataclass(slots=True)
class Reservation:
    """One runner on the account. Times are on the caller's clock, in seconds."""

    name: str
    pinned: bool
    keep: float
    """Seconds that it stays loaded without being used; infinity for ever."""
    last_used: float
    state: State = "asking"
    kind: str = ""
    """What the next runner of the same model has as well."""
    users: int = 0
    dismissed: bool = False
    """It ends when nobody uses it, whatever others need."""
    evicting: float | None = None
    """Since when it has been in the way of others; it ends when nobody uses it, if it still is."""
    stays_until: float = -math.inf
    """Until then it is not evicted."""
    returning: bool = False
    """Its model was evicted just before, so it stays for a while once it has loaded."""
    abandoned: bool = False
    """Whoever wanted it has left before it got its memory."""
    ending: bool = False
    """It has been told to end."""
    estimated: Estimated | None = None
    reserved: Memory = field(default_factory=Memory)
    later: Memory = field(default_factory=Memory)
    """Of what is reserved, what loading does not take yet."""
    measured: Memory | None = None
    """What it takes by the last measurement."""

    @property
    def leaving(self) -> bool:
        """Whether nobody new may use it."""
        return self.dismissed or self.evicting is not None or self.ending

    @property
    def idle(self) -> bool:
        """Whether it may be ended at once."""
        return self.users == 0 and (self.state == "loaded" or (self.state == "waiting" and self.abandoned))

    @property
    def expires(self) -> float:
        """When it is unloaded of itself; infinity if it is not."""
        return self.last_used + self.keep if self.idle and not self.leaving else math.inf

    def time_left(self, now: float) -> float | None:
        """Until it is unloaded if nobody uses it from now on; None if it is not."""
        if self.keep == math.inf:
            return None
        return max(0.0, self.expires - now) if self.idle and not self.leaving else self.keep


@final
class MemoryBudget:
    """``capacity`` None: nothing is counted and everything fits.

    ``residence``: how many seconds a model stays loaded that takes turns with another. ``drain``: how many seconds the
    requests of a runner may keep others waiting for its memory.
    """

    def __init__(self, capacity: Memory | None = None, residence: float = 0.0, drain: float = math.inf) -> None:
        self.capacity = capacity
        self._residence = residence
        self._drain = drain
        self._settled = -math.inf
        self._evicted: dict[str, float] = {}
        """When a runner of each kind was evicted last."""
        self._entries: dict[str, Reservation] = {}
        self._line: list[Reservation] = []
        """Those that wait for memory, in order of arrival."""

    def need(self, choice: LoadOption) -> Memory:
        """What a way to load takes."""
        return Memory(choice.host, self._devices(choice.devices, choice.device))

    def _devices(self, named: Mapping[str, int], first: int) -> dict[str, int]:
        known = self.capacity.devices if self.capacity is not None else ()
        name = next(iter(known), UNKNOWN)
        return {**named, name: named.get(name, 0) + first} if first else dict(named)

    @property
    def reserved(self) -> Memory:
        """Of all runners."""
        return sum((each.reserved for each in self._entries.values()), Memory())

    @property
    def free(self) -> Memory:
        """What is not reserved; less than nothing where runners have taken more than they were to."""
        assert self.capacity is not None
        return self.capacity - self.reserved

    @property
    def waits(self) -> bool:
        """Whether somebody waits for memory."""
        return bool(self._line)

    def entry(self, name: str) -> Reservation | None:
        """A runner's, for reading."""
        return self._entries.get(name)

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._entries.values())

    # --- what happens to a runner ---

    def enter(self, name: str, now: float, *, kind: str = "", pinned: bool = False, keep: float = math.inf) -> None:
        """Opens an entry, which holds no memory yet. Runners of the same model have the same ``kind``."""
        assert name not in self._entries, f"{name} is on the account already"
        kind = kind or name
        returning = now - self._evicted.get(kind, -math.inf) < ALTERNATING_SECONDS or any(
            each.kind == kind and each.evicting is not None for each in self
        )
        self._entries[name] = Reservation(name, pinned, keep, now, kind=kind, returning=returning)

    def estimate(self, name: str, estimated: Estimated) -> None:
        """Puts a runner in line."""
        entry = self._entries[name]
        assert entry.state == "asking"
        entry.state, entry.estimated = "waiting", estimated
        self._line.append(entry)

    def load(self, name: str) -> None:
        """A runner loads without having been asked what it takes."""
        entry = self._entries[name]
        assert entry.state == "asking"
        entry.state = "loading"

    def loaded(self, name: str, now: float) -> None:
        """A runner has its model in memory."""
        entry = self._entries[name]
        assert entry.state == "loading"
        entry.state, entry.last_used = "loaded", now
        if entry.returning:
            entry.stays_until = now + self._residence
        if entry.evicting is not None:
            entry.evicting = now  # the time to load is not counted as that of its requests

    def measure(self, name: str, host: int, devices: Mapping[str, int] | None) -> None:
        """What a runner that has loaded takes replaces what was estimated, but for what it will take later.

        The first measurement says how good the estimate was; later ones can only show that it was too small. Where
        nobody can tell what it takes on devices, None, the estimate stays.
        """
        entry = self._entries[name]
        assert entry.state == "loaded"
        estimated = entry.reserved - entry.later if entry.measured is None else entry.measured
        taken = Memory(host, estimated.devices if devices is None else devices)
        entry.reserved = (taken + entry.later) if entry.measured is None else entry.reserved.at_least(taken)
        entry.measured = taken

    def use(self, name: str) -> None:
        """One more request needs a runner."""
        self._entries[name].users += 1
        self._entries[name].abandoned = False

    def disuse(self, name: str, now: float) -> None:
        """One request less does; of a runner that is gone, nothing."""
        if (entry := self._entries.get(name)) is not None:
            entry.users -= 1
            entry.last_used = now
            entry.abandoned = entry.users == 0 and entry.state in ("asking", "waiting") and not entry.pinned

    def keep(self, name: str, seconds: float) -> None:
        """How long a runner stays loaded without being used."""
        self._entries[name].keep = seconds

    def leave(self, name: str) -> None:
        """A runner is to end as soon as nobody uses it."""
        self._entries[name].dismissed = True

    def release(self, name: str) -> None:
        """A runner is gone, however it went."""
        entry = self._entries.pop(name)
        if entry in self._line:
            self._line.remove(entry)

    # --- what follows from it ---

    def next_expiry(self) -> float:
        """When time alone changes what is to be done; infinity if it does not."""
        times = [entry.expires for entry in self]
        times += [entry.evicting + self._drain for entry in self if self._drains(entry) and entry.evicting is not None]
        if self._line:
            times += [entry.stays_until for entry in self if entry.stays_until > self._settled]
        return min(times, default=math.inf)

    def _drains(self, entry: Reservation) -> bool:
        """Whether its requests keep others waiting."""
        return entry.state == "loaded" and entry.users > 0 and not entry.ending

    def settle(self, now: float) -> MemoryActions:
        """What is to be done after something has happened, or a runner's time is over."""
        self._settled = now
        before = {entry.name: entry.evicting for entry in self if entry.evicting is not None}
        for entry in self:
            entry.dismissed = entry.dismissed or entry.expires <= now
            entry.evicting = entry.evicting if entry.ending else None
        granted: dict[str, LoadOption] = {}
        refused: dict[str, DoesNotFit] = {}
        ahead, first = Memory(), True
        for entry in tuple(self._line):
            assert entry.estimated is not None
            choice, wanted = self._choice(entry.estimated, ahead), self._wanted(entry.estimated)
            if choice is None and entry.abandoned:
                entry.dismissed = True
                self._line.remove(entry)
                continue
            if choice is None and wanted is None:
                refused[entry.name] = self._refusal(entry.estimated)
                self._line.remove(entry)
                continue
            if choice is None and first:
                choice = self._make_room(entry.estimated, now, before)
            if choice is not None:
                granted[entry.name] = choice
                self._grant(entry, choice)
            elif wanted is not None:
                ahead += self.need(wanted)
                first = False
        unload = [each for each in self if each.leaving and each.idle and not each.ending]
        displace = [
            each
            for each in self
            if self._drains(each) and each.evicting is not None and each.evicting + self._drain <= now
        ]
        for each in (*unload, *displace):
            each.ending = True
            if each.evicting is not None and not each.dismissed:
                self._evicted[each.kind] = now
        return MemoryActions(
            granted, refused, tuple(each.name for each in unload), tuple(each.name for each in displace)
        )

    def _grant(self, entry: Reservation, choice: LoadOption) -> None:
        self._line.remove(entry)
        entry.state = "loading"
        entry.reserved = self.need(choice)
        entry.later = Memory(choice.later_host, self._devices(choice.later_devices, choice.later_device))

    def _choice(self, estimated: Estimated, ahead: Memory) -> LoadOption | None:
        """The best choice, of those that are enough, for which there is memory besides what others wait for."""
        if self.capacity is None:
            return estimated.choices[0]
        room = self.free - ahead
        return next((each for each in estimated.choices[: estimated.enough + 1] if self.need(each).fits(room)), None)

    def _wanted(self, estimated: Estimated) -> LoadOption | None:
        """The best of those no better than enough that there could be memory for, all others gone."""
        if self.capacity is None:
            return estimated.choices[0]
        most = self._most()
        return next((each for each in estimated.choices[estimated.enough :] if self.need(each).fits(most)), None)

    def _most(self) -> Memory:
        """What is free once all that are not pinned have gone."""
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
        """Has others leave, idle ones rather than busy ones; a choice, if it turns out that one fits already.

        ``before`` are those that were leaving for others until now, and since when. They go first, so that a runner is
        not spared for having ended one of its requests.
        """
        acceptable = estimated.choices[estimated.enough :]
        going = [each for each in self if each.leaving]
        free, coming = self.free, sum((each.reserved for each in going), Memory())
        staying = [each for each in self if not each.leaving and not each.pinned and each.reserved != Memory()]
        staying = [
            each for each in staying if each.stays_until <= now and not (each.returning and each.state == "loading")
        ]
        staying.sort(key=lambda each: (each.name not in before, each.last_used))
        idle = [each for each in staying if each.idle]
        busy = [each for each in staying if not each.idle]
        for candidates in (idle, [*idle, *busy]):
            for choice in acceptable:
                if self.need(choice).fits(free):
                    return choice
                victims = _victims(self.need(choice), free + coming, candidates)
                if victims is not None:
                    for each in (*victims, *going):
                        each.evicting = before.get(each.name, now)
                    return None
        return None


def _victims(needed: Memory, room: Memory, candidates: Sequence[Reservation]) -> list[Reservation] | None:
    """As few as needed of the first candidates, so that there is room; None if all of them are not enough."""
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
