"""One runner's reservation in the memory budget."""

import math
from dataclasses import dataclass, field
from typing import Literal

from exo.worker.protocol.events import Estimated
from exo.worker.supervisor.does_not_fit import DoesNotFit
from exo.worker.supervisor.memory import Memory

State = Literal["asking", "waiting", "loading", "loaded"]
_TRANSITIONS: dict[State, tuple[State, ...]] = {
    "asking": ("waiting", "loading"),  # loads at once, without an estimate, if nothing is counted
    "waiting": ("loading",),
    "loading": ("loaded",),
    "loaded": (),
}
"""A reservation awaits its estimate, then its memory, then the end of the load. It may be released at any time."""


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
