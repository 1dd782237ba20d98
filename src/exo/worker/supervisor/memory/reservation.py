"""One runner's reservation in the memory budget, and the reason for a refused one."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pydantic_core import to_json

from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.supervisor.memory.memory import HOST, Memory

State = Literal["asking", "waiting", "loading", "loaded"]
_TRANSITIONS: dict[State, tuple[State, ...]] = {
    "asking": ("waiting", "loading"),  # loads at once, without an estimate, if nothing is counted
    "waiting": ("loading",),
    "loading": ("loaded",),
    "loaded": (),
}
"""A reservation awaits its estimate, then its memory, then the end of the load. It may be released at any time."""


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """Why a model cannot be loaded. ``room`` is the memory that would be free without all unpinned runners."""

    needed: Memory
    room: Memory
    remedies: tuple[LoadOption, ...]
    """For each setting, the smallest change with which the model would fit."""

    def needs(self, model_id: str) -> str:
        """The memory that the model needs and the memory that there is, in words."""
        short = [
            f"{needed:,} bytes of {_named(name)}, and at most {room:,} can be freed for it"
            for name, needed, room in self.needed.beyond(self.room)
        ]
        return f"{model_id} needs {' and '.join(short)} here"

    def forced_note(self, model_id: str) -> str:
        """The note on a model that is loaded nevertheless."""
        return f"loaded against the memory budget: {self.needs(model_id)}"

    def message(self, model_id: str, runner: str) -> str:
        """The error message for the client."""
        text = self.needs(model_id)
        if not self.remedies:
            return f"{text}; no setting of [{runner}] in its model card would make it fit"
        ways = (
            " and ".join(f"{key} = {to_json(value).decode()}" for key, value in each.settings.items())
            for each in self.remedies
        )
        return f"{text}; with {', or '.join(ways)} in [{runner}] of its model card it would fit"


def _named(account: str) -> str:
    host, _, device = account.rpartition("/")
    on = [each for each in ("" if device == HOST else device, host) if each]
    return f"memory on {' of '.join(on)}" if on else "memory"


@dataclass(slots=True)
class Reservation:
    """One runner's share of the budget. Times are on the caller's clock, in seconds."""

    name: str
    pinned: bool
    keep: float
    """Time that the model stays loaded without being used; infinity for ever."""
    last_used: float
    state: State = "asking"
    kind: str = ""
    """The same for all runners of one model."""
    forced: bool = False
    """It loads with whatever memory can be freed for it, if its estimate says that this is not enough."""
    too_large: DoesNotFit | None = None
    """Why it would not have been loaded if it were not forced."""
    users: int = 0
    dismissed: bool = False
    """It ends when it is idle, even if no other needs its memory."""
    evicting: float | None = None
    """Since when others have waited for its memory. ``settle`` decides anew each time whether they still do."""
    stays_until: float = -math.inf
    """It is not evicted before then."""
    returning: bool = False
    """Its model was evicted a moment ago, so it stays for a while once it has loaded."""
    abandoned: bool = False
    """Its requests left before it got its memory."""
    ending: bool = False
    """It has been told to end."""
    estimated: Estimated | None = None
    reserved: Memory = field(default_factory=Memory)
    later: Memory = field(default_factory=Memory)
    """The part of ``reserved`` that is allocated with the first request, not by loading."""
    measured: Memory | None = None
    """The last measurement."""

    def change_state(self, state: State) -> None:
        """The only writer of the state."""
        assert state in _TRANSITIONS[self.state], f"{self.name}: {self.state} to {state}"
        self.state = state

    @property
    def leaving(self) -> bool:
        """Whether it takes no new requests."""
        return self.dismissed or self.evicting is not None or self.ending

    @property
    def idle(self) -> bool:
        """Whether it may be ended at once."""
        return self.users == 0 and (self.state == "loaded" or (self.state == "waiting" and self.abandoned))

    @property
    def drains(self) -> bool:
        """Whether its requests would keep others waiting."""
        return self.state == "loaded" and self.users > 0 and not self.ending

    @property
    def expires(self) -> float:
        """The time at which it is unloaded because it is unused; infinity if it stays."""
        return self.last_used + self.keep if self.idle and not self.leaving else math.inf

    def time_left(self, now: float) -> float | None:
        """Seconds until it is unloaded if nobody uses it from now on; None for never."""
        if self.keep == math.inf:
            return None
        return max(0.0, self.expires - now) if self.idle and not self.leaving else self.keep
