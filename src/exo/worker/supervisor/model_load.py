"""The load of a runner's model: the estimate of its memory, the wait for that memory, and the progress."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

from pydantic import JsonValue
from pydantic_core import to_json

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import Capabilities, Estimated, Event, Failed, LoadOption, Status
from exo.worker.protocol.wire import ProtocolError
from exo.worker.supervisor.child_process import ChildProcess
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.watchdog import Deadlines, LoadProgress


@dataclass(frozen=True, slots=True)
class Admission:
    """The option to load, and a smaller one to load if memory runs out nevertheless."""

    option: LoadOption
    smaller: LoadOption | None = None

    @property
    def changes(self) -> dict[str, JsonValue]:
        """The settings of the smaller option that differ."""
        settings: Mapping[str, JsonValue] = {} if self.smaller is None else self.smaller.settings
        return {key: value for key, value in settings.items() if self.option.settings.get(key) != value}


Admit = Callable[[Estimated], Awaitable[Admission]]
"""Waits until there is memory. Raises ``RunnerError`` if there will be none."""


@final
class ModelLoad:
    """With ``admit``, the runner first estimates the memory of its load, and loads once that is granted."""

    def __init__(self, load: Load, admit: Admit | None, deadlines: Deadlines) -> None:
        self._load = load
        self._admit = admit
        self._deadlines = deadlines
        self._progress: LoadProgress | None = None  # of the estimate or load under way
        self._estimate: asyncio.Future[Estimated] = asyncio.get_running_loop().create_future()
        self._admission: Admission | None = None
        self.refused: Failed | None = None
        self.stalled = False

    def begin(self, child: ChildProcess, now: float) -> None:
        """Sends the first command, to a runner that is idle."""
        self._send(child, self._load if self._admit is None else Estimate(load=self._load), now)

    def _send(self, child: ChildProcess, command: Estimate | Load, now: float) -> None:
        estimates = command.type == "estimate"
        phase = "while it estimated the memory that loading takes" if estimates else "after the load command"
        self._progress = LoadProgress(self._deadlines, now, phase)
        child.send(command)

    async def run(self, child: ChildProcess) -> None:
        """Has the runner load once its memory is granted, or ends it once that is refused."""
        if self._admit is None:
            return
        try:
            self._admission = admission = await self._admit(await self._estimate)
        except RunnerError as error:
            self.refused = error.failed
            child.signal(signal.SIGKILL)
        else:
            table = {**self._load.table, **admission.option.settings}
            load = self._load.model_copy(update={"table": table, "smaller": admission.changes})
            self._send(child, load, asyncio.get_running_loop().time())

    def take(self, event: Event, before: Status, now: float) -> bool:
        """Notes an event that follows the status ``before``. Returns whether it is the estimate that was requested.

        Raises ``ProtocolError`` if there is no progress for too long.
        """
        if self._progress is None:
            return False
        if (fault := self._progress.take(event, before, now)) is not None:
            self.stalled = True
            raise ProtocolError(fault)
        if not isinstance(event, Estimated) or self._admit is None or self._estimate.done():
            return False
        self._estimate.set_result(event)
        return True

    def notes(self, capabilities: Capabilities) -> Iterator[str]:
        """Yields what the user should know about the load, and about the model."""
        if self._admission is not None and capabilities.retried:
            settings = (f"{key} = {to_json(value).decode()}" for key, value in self._admission.changes.items())
            yield f"loaded with {' and '.join(settings)}, because memory ran out without: {capabilities.retried}"
        yield from capabilities.notes
