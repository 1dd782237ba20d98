"""The node program: on a host of another server, it tells what the host has, and downloads models there.

It answers on standard output and ends with its input. Its lines are the host's sign of life.
"""

import asyncio
import math
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import BinaryIO, final

import anyio
import psutil
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from anyio.to_thread import run_sync
from pydantic import ValidationError

import exo
from exo.cards.card import ModelCard
from exo.config import Settings
from exo.serving.errors import ServingError
from exo.serving.pull_jobs import Pulls
from exo.worker.host import Host, updated
from exo.worker.protocol.messages import Message
from exo.worker.protocol.validation import describe
from exo.worker.protocol.wire import encode, exit_now, take_protocol_stream
from exo.worker.supervisor.host_probe import PROBE_SECONDS, TRY_SECONDS, probe_host
from exo.worker.supervisor.memory.host import capacity, memory_of, usable_memory, usable_ram
from exo.worker.supervisor.memory.memory import HOST
from exo.worker.supervisor.node_messages import (
    NODE_COMMANDS,
    Beat,
    HostFound,
    HostUsage,
    PullEnded,
    PullFiles,
    Pulling,
    RunnerUse,
    StopPull,
)

_BEAT_SECONDS = 1.0
_BEATS_PER_MEASUREMENT = 5


def run_node(settings: Settings, server: str) -> None:
    """Serves the server with this id until standard input ends. Does not return."""
    node = NodeProgram(settings, server, take_protocol_stream())
    anyio.run(node.run)
    exit_now(0)


@final
class NodeProgram:
    """Writes its lines to ``output``. ``server`` is in the labels of the server's runners here."""

    def __init__(self, settings: Settings, server: str, output: BinaryIO) -> None:
        self._settings = settings
        self._server = server
        self._output = output
        self._host: Host | None = None
        self._pulls: dict[int, anyio.CancelScope] = {}

    async def run(self) -> None:
        """Does not return: the end of standard input ends the process."""
        async with Pulls(self._settings) as pulls, anyio.create_task_group() as tasks:
            send, receive = anyio.create_memory_object_stream[PullFiles | StopPull](math.inf)
            read = partial(self._read, asyncio.get_running_loop(), send)
            threading.Thread(target=read, daemon=True).start()
            tasks.start_soon(self._beat)
            tasks.start_soon(self._obey, receive, tasks, pulls)
            host = await self._probe(PROBE_SECONDS)
            if host.unanswered:
                await self._probe(TRY_SECONDS)

    def _read(self, loop: asyncio.AbstractEventLoop, commands: MemoryObjectSendStream[PullFiles | StopPull]) -> None:
        for line in sys.stdin.buffer:
            try:
                command = NODE_COMMANDS.validate_json(line)
            except ValidationError as error:
                print(f"ignored a line that is not a command: {describe(error)[1]}", file=sys.stderr, flush=True)
                continue
            loop.call_soon_threadsafe(commands.send_nowait, command)
        exit_now(0)

    async def _obey(
        self, commands: MemoryObjectReceiveStream[PullFiles | StopPull], tasks: TaskGroup, pulls: Pulls
    ) -> None:
        async for command in commands:
            if isinstance(command, PullFiles):
                self._pulls[command.id] = anyio.CancelScope()
                tasks.start_soon(self._pull, command, pulls)
            elif (scope := self._pulls.get(command.id)) is not None:
                scope.cancel()

    async def _pull(self, command: PullFiles, pulls: Pulls) -> None:
        ended = PullEnded(id=command.id)
        try:
            card = ModelCard.from_toml(command.card)
            with self._pulls[command.id]:
                async with aclosing(pulls.ensure(card, command.runner, allowed=command.allowed)) as steps:
                    async for progress in steps:
                        self._write(Pulling(id=command.id, progress=progress))
        except ServingError as error:
            ended = PullEnded(id=command.id, code=error.code, message=str(error))
        except Exception as error:  # noqa: BLE001 - the server tells its client
            ended = PullEnded(id=command.id, code="internal_error", message=repr(error))
        del self._pulls[command.id]
        self._write(ended)

    async def _probe(self, deadline: float) -> Host:
        found = await probe_host(deadline=deadline)
        host = self._host = found if self._host is None else updated(self._host, found)
        prefixes = self._settings.prefix_directory
        memory = capacity(host, self._settings.limits.memory)
        self._write(
            HostFound(
                version=exo.__version__,
                host=host,
                memory={HOST: memory.host, **memory.devices},
                directories=tuple(map(str, self._settings.models_directories)),
                prefixes="" if prefixes is None else str(prefixes),
            )
        )
        return host

    async def _beat(self) -> None:
        while True:
            self._write(Beat())
            for _ in range(_BEATS_PER_MEASUREMENT):
                await anyio.sleep(_BEAT_SECONDS)
                self._write(Beat())
            if self._host is not None:
                names = [each.id for each in self._host.nvidia_devices]
                self._write(await run_sync(_measure, self._server, names))

    def _write(self, message: Message) -> None:
        try:
            self._output.write(encode(message))
        except OSError:  # the server is gone
            exit_now(0)


def _measure(server: str, device_names: list[str]) -> HostUsage:
    runners = _runners(server)
    found = memory_of(runners.values(), device_names)
    uses = {
        name: RunnerUse(pid=pid, host=found[pid].host, devices=found[pid].devices)
        for name, pid in runners.items()
        if pid in found
    }
    free = usable_memory(device_names, {}) if any(device_names) else {}
    return HostUsage(free={HOST: usable_ram(()), **free}, runners=uses)


def _runners(server: str) -> Mapping[str, int]:
    """The process ids of the server's runners here, by instance. Their command line has a label from ``guard``."""
    prefix, found = f"label={server}:", dict[str, int]()
    for process in psutil.process_iter(["cmdline", "uids"]):
        command = process.info["cmdline"] or ()
        for word in command[:6]:
            if word.startswith(prefix) and process.info["uids"].real == os.getuid():
                found.setdefault(word.removeprefix(prefix), process.pid)
    return found
