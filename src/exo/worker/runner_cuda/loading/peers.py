"""Devices of other hosts, which llama.cpp's RPC servers lend to this runner. It starts one server on each host."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import chain

from pydantic import TypeAdapter, ValidationError

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Failed
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.part_process import PartProcess, check_private
from exo.worker.runner_cuda.bindings import engine_version
from exo.worker.runner_cuda.loading.devices import Gpu, far_gpus, gpus
from exo.worker.runner_cuda.plugin import PluginError
from exo.worker.runner_cuda.rpc_server import Serving

_CONNECT_SECONDS = 5.0
_LOST_SECONDS = 5
"""Time without an acknowledgement after which the kernel breaks the connection to a host. llama.cpp waits for ever."""
_SAID: TypeAdapter[Serving | Failed] = TypeAdapter(Serving | Failed)


def all_gpus(load: Load) -> tuple[Gpu, ...]:
    """Returns the devices of the load's backend on this host, and those of its peers. Raises LoadError."""
    lent = (_lent(each.name, each.command, each.address) for each in load.peers)
    return (*gpus(load.backend), *chain.from_iterable(lent))


@cache
def _lent(host: str, command: tuple[str, ...], address: str) -> tuple[Gpu, ...]:
    """Starts the server of a host and returns its devices. Raises LoadError."""
    check_private(address)
    try:
        server = PartProcess(f"host {host}", (*command, "--rpc-server", address))
        serving = _serving(server)
        endpoint = address, serving.port
        # llama.cpp would wait for minutes, and then end this process.
        socket.create_connection(endpoint, _CONNECT_SECONDS).close()
        lent = far_gpus(f"{address}:{serving.port}", [f"{host}/{each}" for each in serving.devices])
        _limit_silence(endpoint)
    except (OSError, PluginError) as error:
        raise LoadError("model_load_failed", f"host {host} lends no devices: {error}") from error
    server.need()
    return lent


def _serving(server: PartProcess) -> Serving:
    """Waits for a server's first line. Raises LoadError."""
    what, line = "start llama.cpp's RPC server", server.line()
    try:
        said = _SAID.validate_json(line)
    except ValidationError as error:
        raise server.could_not(what, line) from error
    if isinstance(said, Failed):
        raise server.could_not(what, said.message)
    if said.engine_version != (own := engine_version()):
        raise server.could_not(what, f"it has llama.cpp {said.engine_version}, and this host has {own}")
    return said


def _limit_silence(server: tuple[str, int]) -> None:
    """Has the kernel break this process's connection to a server that does not answer any more."""
    for opened in _connections(server):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, 1),
            (socket.TCP_KEEPINTVL, 1),
            (socket.TCP_KEEPCNT, _LOST_SECONDS),
            (socket.TCP_USER_TIMEOUT, 1000 * _LOST_SECONDS),
        ):
            opened.setsockopt(socket.IPPROTO_TCP, option, value)


def _connections(server: tuple[str, int]) -> Iterator[socket.socket]:
    """Yields this process's sockets that are connected to a server. llama.cpp does not give them out."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as opened:  # no socket, or not connected
            if opened.getpeername() == server:
                yield opened
