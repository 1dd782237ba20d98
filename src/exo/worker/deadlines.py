"""How long a runner may say nothing before it is taken for dead."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import anyio

_LOOKS = 5
"""How often a silence is looked at before its deadline. A server that is itself stopped for a while, as by Ctrl-Z, then
misses one look and not the whole deadline."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds after which a runner is taken for dead."""

    handshake: float = 60
    """Until its first word."""
    loading: float = 60
    """Without a word while it loads: libraries that start up may hold the interpreter, and the heartbeat, for long."""
    serving: float = 10
    """Without a word once the model is loaded."""
    step: float = 300
    """Without a step while it has requests, in a slot or waiting."""
    grace: float = 5
    """For each of the ways to end it, from the polite to the last."""


DEADLINES = Deadlines()


@final
class Silence:
    """A runner's, which its every word breaks, its heartbeat included."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._heard = False

    def end(self) -> None:
        """Notes a word."""
        self._heard = True

    async def too_long(self, is_loading: Callable[[], bool]) -> str:
        """Returns once it has lasted too long: the runner is stopped, or it hangs. Says so, going on from "it"."""
        look = min(self._deadlines.loading, self._deadlines.serving) / _LOOKS
        silence, allowed = 0.0, self._deadlines.loading
        while silence < allowed:
            self._heard = False
            await anyio.sleep(look)
            silence = 0.0 if self._heard else silence + look
            allowed = self._deadlines.loading if is_loading() else self._deadlines.serving
        return f"said nothing for {allowed:g} seconds, not even its heartbeat"
