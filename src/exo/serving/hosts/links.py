"""The connections to other hosts: one node program on each, whose lines are the host's sign of life."""

import logging
import random
import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import final

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import ValidationError

from exo.cards.card import ModelCard
from exo.serving.errors import ServingError
from exo.start_process import start_process
from exo.store.progress import DownloadProgress
from exo.terminal import printable
from exo.worker.host import Host
from exo.worker.protocol.events import ErrorCode, Failed
from exo.worker.protocol.remote_host import RemoteHost
from exo.worker.protocol.wire import encode
from exo.worker.supervisor.child_process import signal_group
from exo.worker.supervisor.node_messages import (
    NODE_EVENTS,
    Beat,
    HostFound,
    HostUsage,
    NodeEvent,
    PullEnded,
    PullFiles,
    Pulling,
    StopPull,
)
from exo.worker.supervisor.pool import RunnerPool
from exo.worker.supervisor.runner_error import RunnerError

log = logging.getLogger(__name__)

_SILENT_SECONDS = 10.0
"""A node writes a line each second. ssh ends by itself within four seconds when a host is cut off."""
_START_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_TRIED_SECONDS = 10.0
_LINE_BYTES = 8 << 20
_LOST: ErrorCode = "runner_died"
_REASON_CHARACTERS = 300


@dataclass(slots=True)
class _Link:
    host: RemoteHost
    found: Host | None = None
    """None while the host is down."""
    why: str = "has not answered yet"
    """Why it is down, as a predicate."""
    tried: anyio.Event = field(default_factory=anyio.Event)
    process: Process | None = None
    pulls: dict[int, Callable[[Pulling | PullEnded], None]] = field(
        default_factory=dict[int, Callable[[Pulling | PullEnded], None]]
    )


@final
class HostLinks:
    """Keeps a node program running on each host, and tells ``pool`` which hosts are there."""

    def __init__(self, hosts: Sequence[RemoteHost], pool: RunnerPool) -> None:
        self._links = {each.name: _Link(each) for each in hosts}
        self._pool = pool
        self._numbers = count()
        self._came_up = anyio.Event()

    @property
    def up(self) -> dict[str, Host]:
        """The hosts that can be used now, in the order of the user's file."""
        return {name: each.found for name, each in self._links.items() if each.found is not None}

    @property
    def down(self) -> dict[str, str]:
        """Why each of the others cannot be used, as a predicate of the host."""
        return {name: each.why for name, each in self._links.items() if each.found is None}

    async def tried(self) -> None:
        """Waits until every host has answered once or has failed to, for a limited time."""
        with anyio.move_on_after(_TRIED_SECONDS):
            for each in self._links.values():
                await each.tried.wait()

    async def comes_up(self) -> None:
        """Waits until a host can be used that could not."""
        await self._came_up.wait()

    async def run(self) -> None:
        """Keeps the connections. Does not return."""
        async with anyio.create_task_group() as tasks:
            for each in self._links.values():
                tasks.start_soon(self._keep, each)

    async def _keep(self, link: _Link) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                why = await self._follow(link)
            except Exception as error:
                log.exception("the connection to host %s has failed", link.host.name)
                why = f"is left out: {error!r}"
            pause = _FIRST_PAUSE_SECONDS if link.found is not None else pause
            if link.found is not None or not link.tried.is_set():
                log.warning("host %s %s", link.host.name, why)
            self._lose(link, why)
            await anyio.sleep(pause * (1 - random.random() / 2))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _lose(self, link: _Link, why: str) -> None:
        link.found, link.why = None, why
        link.tried.set()
        for number, take in tuple(link.pulls.items()):
            take(PullEnded(id=number, code=_LOST, message=f"host {link.host.name} {why}"))
        self._pool.host_down(link.host.name, why)

    async def _follow(self, link: _Link) -> str:
        """Runs the node program and handles its lines. Returns why it has ended."""
        command = link.host.command("exo", "node", self._pool.hosts.server_id)
        try:
            process = await start_process(command, start_new_session=True)
        except OSError as error:
            return f"cannot be reached: {command[0]}: {error.strerror}"
        link.process = process
        complaint = bytearray()
        why = "has ended the connection"
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_keep_end, process.stderr, complaint)
                why = await self._listen(link, BufferedByteReceiveStream(process.stdout))
                with anyio.move_on_after(0.5):  # its last words
                    await process.wait()
                tasks.cancel_scope.cancel()
        finally:
            link.process = None
            signal_group(process.pid, signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                await process.aclose()
        said = printable(complaint.decode(errors="replace").strip().rpartition("\n")[2])
        return f"{why}: {said[:_REASON_CHARACTERS]}" if said else why

    async def _listen(self, link: _Link, lines: BufferedByteReceiveStream) -> str:
        while True:
            try:
                with anyio.fail_after(_START_SECONDS if link.found is None else _SILENT_SECONDS):
                    event = NODE_EVENTS.validate_json(await lines.receive_until(b"\n", _LINE_BYTES))
            except TimeoutError:
                return "does not answer"
            except ValidationError:
                command = " ".join(link.host.command("exo", "node"))
                return f"does not answer as exo does; this command must run exo there: {command}"
            except (anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.ClosedResourceError):
                return "cannot be reached" if link.found is None else "is lost"
            if (why := self._take(link, event)) is not None:
                return why

    def _take(self, link: _Link, event: NodeEvent) -> str | None:
        """Returns why the host cannot be used, if it cannot."""
        match event:
            case Beat():
                pass
            case HostFound():
                if why := event.other_version():
                    return why
                comes, link.found = link.found is None, event.host
                self._pool.host_up(link.host.name, event)
                link.tried.set()
                if comes:
                    log.info("host %s is there", link.host.name)
                    self._came_up.set()
                    self._came_up = anyio.Event()
            case HostUsage():
                self._pool.host_usage(link.host.name, event)
            case Pulling() | PullEnded():
                if (take := link.pulls.get(event.id)) is not None:
                    take(event)
        return None

    async def ensure(
        self, host: str, card: ModelCard, runner: str, *, allowed: bool
    ) -> AsyncGenerator[DownloadProgress]:
        """Has a host download the files of a runner that are missing there. Raises ``ServingError``, and
        ``RunnerError`` if the host is lost meanwhile.
        """
        link, number = self._links[host], next(self._numbers)
        send, receive = anyio.create_memory_object_stream[Pulling | PullEnded](1 << 10)

        def take(event: Pulling | PullEnded) -> None:
            with suppress(anyio.WouldBlock, anyio.ClosedResourceError):  # progress in between may be missed
                send.send_nowait(event)

        with send, receive:
            link.pulls[number] = take
            ended = False
            try:
                await self._send(link, PullFiles(id=number, card=card.to_toml(), runner=runner, allowed=allowed))
                async for event in receive:
                    if isinstance(event, Pulling):
                        yield event.progress
                        continue
                    ended = True
                    if event.code == _LOST:
                        raise RunnerError(Failed(code=_LOST, message=event.message))
                    if event.code:
                        raise ServingError(f"on host {host}: {event.message}", code=event.code, param="model")
                    return
            finally:
                del link.pulls[number]
                if not ended:
                    with anyio.CancelScope(shield=True):
                        await self._send(link, StopPull(id=number))

    async def _send(self, link: _Link, command: PullFiles | StopPull) -> None:
        if link.process is not None and link.process.stdin is not None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError), anyio.move_on_after(_SILENT_SECONDS):
                await link.process.stdin.send(encode(command))


async def _keep_end(stream: ByteReceiveStream, end: bytearray) -> None:
    async for data in stream:
        end += data
        del end[:-4096]
