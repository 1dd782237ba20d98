"""Asks the runners for their abilities on this host, again if one did not answer, and when a request needs it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import final

import anyio

from exo.worker.host import Host, unused_gpus, updated
from exo.worker.supervisor.host_probe import PROBE_SECONDS, TRY_SECONDS, probe_host

log = logging.getLogger(__name__)

_PROBE_AGAIN_SECONDS = 30.0
"""The minimum time between two probes that requests cause."""
_LONGEST_PAUSE_SECONDS = 600.0
"""The maximum time between two probes of a runner that does not answer."""


@final
class HostProber:
    """Probes the host. Each result goes to ``on_host``."""

    def __init__(self, commands: Mapping[str, Sequence[str]] | None, on_host: Callable[[Host], None]) -> None:
        """``commands`` start the runners, by name; None means the real ones."""
        self.host: Host | None = None  # None until the first probe has ended
        self._commands = commands and {name: (*command, "--probe") for name, command in commands.items()}
        self._on_host = on_host
        self._probed = anyio.Event()
        self._probing = anyio.Lock()
        self._next = 0.0  # the time of the next probe that a request may cause

    async def first(self) -> Host:
        """Waits for the first probe."""
        await self._probed.wait()
        assert self.host is not None
        return self.host

    async def probe_again(self) -> Host:
        """Probes the host again, unless that was done a moment ago."""
        before = self.host
        async with self._probing:
            if self.host is before and anyio.current_time() >= self._next:
                await self._probe(PROBE_SECONDS)
        return await self.first()

    async def run(self) -> None:
        """Probes the host; runners that do not answer in time are probed again with more time."""
        async with self._probing:
            host = await self._probe(PROBE_SECONDS)
            if host is None or host.unanswered:  # requests that need such a runner wait for this probe
                host = await self._probe(TRY_SECONDS)
        pause = _PROBE_AGAIN_SECONDS
        while host is None or host.unanswered:
            await anyio.sleep(pause)
            async with self._probing:
                host = await self._probe(TRY_SECONDS)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _probe(self, deadline: float) -> Host | None:
        """Returns None if the system cannot be asked now, for example because too many files are open."""
        try:
            found = await probe_host(self._commands, deadline)
        except Exception:
            log.exception("this machine could not be probed")
            return None
        finally:
            self._next = anyio.current_time() + _PROBE_AGAIN_SECONDS
        if self.host is None:
            unused = unused_gpus(found)
            for name, probe in found.probes.items():
                for note in () if unused and name == "cuda" else probe.notes:
                    log.info("runner %s: %s", name, note)
            if unused:
                log.warning("%s", unused)
        host = self.host = found if self.host is None else updated(self.host, found)
        self._probed.set()
        self._on_host(host)
        if host.unanswered:
            names = ", ".join(sorted(host.unanswered))
            log.warning("the probe of %s did not answer within %g s and is repeated", names, deadline)
        return host
