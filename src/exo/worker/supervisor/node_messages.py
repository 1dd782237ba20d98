"""The lines between the server and the node program of a host, one JSON object each."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

import exo
from exo.store.progress import DownloadProgress
from exo.worker.host import Host
from exo.worker.protocol.messages import Message


class PullFiles(Message):
    """Has the files of a runner downloaded if they are missing; ``allowed`` is whether that may take a download."""

    type: Literal["pull"] = "pull"
    id: int
    card: str
    """TOML text."""
    runner: str
    allowed: bool


class StopPull(Message):
    """Nobody waits for a download any more."""

    type: Literal["stop"] = "stop"
    id: int


NODE_COMMANDS: TypeAdapter[PullFiles | StopPull] = TypeAdapter(
    Annotated[PullFiles | StopPull, Field(discriminator="type")]
)


class HostFound(Message):
    """The first line, and one for each later probe."""

    type: Literal["found"] = "found"
    version: str
    """exo's."""
    host: Host
    memory: Mapping[str, int]
    """Bytes that all runners may take, by account: "memory" for the RAM, and each device's name."""
    directories: tuple[str, ...]
    """Where models are."""
    prefixes: str
    """Where computed prefixes of prompts may be kept; empty for nowhere."""

    def other_version(self) -> str:
        """Why the host cannot be used, as a predicate, if it has another version of exo."""
        if self.version == exo.__version__:
            return ""
        return f"has exo {self.version}, and this machine exo {exo.__version__}: install the same there"


class RunnerUse(Message):
    """A runner of this server on the host. Memory in bytes; ``devices`` is None if the driver does not report it."""

    pid: int
    host: int
    devices: Mapping[str, int] | None


class Beat(Message):
    """The host lives."""

    type: Literal["beat"] = "beat"


class HostUsage(Message):
    """A measurement. ``free`` is memory in bytes that runners could still take, by account."""

    type: Literal["usage"] = "usage"
    free: Mapping[str, int]
    runners: Mapping[str, RunnerUse]
    """By instance."""


class Pulling(Message):
    """The progress of a download."""

    type: Literal["pulling"] = "pulling"
    id: int
    progress: DownloadProgress


class PullEnded(Message):
    """The files are there, or the reason why not."""

    type: Literal["pulled"] = "pulled"
    id: int
    code: str = ""
    """An error's code; empty for success."""
    message: str = ""


NodeEvent = HostFound | Beat | HostUsage | Pulling | PullEnded
NODE_EVENTS: TypeAdapter[NodeEvent] = TypeAdapter(Annotated[NodeEvent, Field(discriminator="type")])
