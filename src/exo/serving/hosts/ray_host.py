"""Runs a program on a node of a Ray cluster with its pipes here, as ``ssh -T`` does.

``ray_host.py ADDRESS NODE COMMAND...`` ends as the command does, with its status, or with 255 if the node is lost.
``ray_host.py ADDRESS`` prints the names of the cluster's other nodes. This file needs Ray and nothing of exo, so that
it can run in an environment of its own; the server imports neither.

Ray starts an actor on the node, which starts the command. The command's data go over TLS connections between the actor
and this process: each side has made a certificate for this command and knows the other's from Ray, so no secret travels
through Ray.
"""

import asyncio
import json
import os
import socket
import ssl
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

LOST = 255
"""The exit status if the node is lost, which is that of ssh."""
_SILENCE_SECONDS = 5
"""Time without an acknowledgement after which the kernel breaks a connection."""
_CHUNK = 1 << 16
_CHANNELS = _INPUT, _OUTPUT, _ERRORS, _STATUS = b"input\n", b"output\n", b"errors\n", b"status\n"
"""The first line of each connection. Each is used in one direction, because TLS cannot end only one."""


class Remote:
    """The actor: one command and its connections. The end of either is that of the other."""

    async def listen(self, address: str, client: bytes, command: Sequence[str]) -> tuple[int, bytes]:
        """Starts the command once the client has made its connections. Returns the port and the actor's certificate."""
        self._command = command
        self._channels: dict[bytes, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        own, key = certificate()
        tls = context(own, key, client, server=True)
        self._server = await asyncio.start_server(self._connected, address, 0, ssl=tls)
        return int(self._server.sockets[0].getsockname()[1]), own

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        break_if_silent(writer)
        self._channels[await reader.readline()] = reader, writer
        if len(self._channels) == len(_CHANNELS):
            self._server.close()
            await self._run()

    async def _run(self) -> None:
        pipe = asyncio.subprocess.PIPE
        output, errors, status = (self._channels[each][1] for each in (_OUTPUT, _ERRORS, _STATUS))
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment(), start_new_session=True
            )
        except OSError as error:
            errors.write(f"{error}\n".encode())
            status.write(b"127")
        else:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            sending = asyncio.ensure_future(copy(self._channels[_INPUT][0], process.stdin))
            await asyncio.gather(copy(process.stdout, output), copy(process.stderr, errors))
            status.write(str(await process.wait()).encode())
            sending.cancel()
        for each in (output, errors, status):
            each.close()


def _environment() -> dict[str, str]:
    """Returns the environment in which the node was started. Ray gives its actors other GPUs and threads."""
    entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(each.split("=", 1) for each in entries if "=" in each)


async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copies to the end, which it passes on to a pipe. A broken connection is an end, too."""
    try:
        while data := await source.read(_CHUNK):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    if sink.can_write_eof():
        sink.write_eof()


def break_if_silent(writer: asyncio.StreamWriter) -> None:
    """Has the kernel break a connection whose other end does not answer any more, and send without delay."""
    opened: socket.socket = writer.get_extra_info("socket")
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, _SILENCE_SECONDS - 1),
        (socket.TCP_USER_TIMEOUT, 1000 * _SILENCE_SECONDS),
    ):
        opened.setsockopt(socket.IPPROTO_TCP, option, value)


def certificate() -> tuple[bytes, bytes]:
    """Makes a self-signed certificate and its key, both as PEM."""
    x509 = import_module("cryptography.x509")
    hashes, serialization = (
        import_module(f"cryptography.hazmat.primitives.{each}") for each in ("hashes", "serialization")
    )
    curves = import_module("cryptography.hazmat.primitives.asymmetric.ec")
    key = curves.generate_private_key(curves.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "exo")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made.public_bytes(serialization.Encoding.PEM), secret


def context(own: bytes, key: bytes, other: bytes, *, server: bool) -> ssl.SSLContext:
    """Makes the settings of a connection to the owner of the certificate ``other``, and to nobody else."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False  # the certificate itself is compared
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cadata=other.decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(own + key)
        file.flush()
        made.load_cert_chain(file.name)
    return made


def _connected_to(address: str) -> Any:  # noqa: ANN401 -- Ray's types are not here
    """Connects to a cluster, "auto" being the one that runs here, and returns Ray's module."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray = import_module("ray")
    ray.init(address=address, log_to_driver=False, logging_level="error", namespace="exo", configure_logging=False)
    return ray


def _nodes(ray: Any) -> dict[str, Any]:  # noqa: ANN401
    """Returns the cluster's nodes that are alive, by name, except the one that this process is on."""
    own = ray.get_runtime_context().get_node_id()
    return {each["NodeName"]: each for each in ray.nodes() if each["Alive"] and each["NodeID"] != own}


async def run(ray: Any, node: str, command: Sequence[str], stdout: int) -> int:  # noqa: ANN401
    """Runs a command on a node. Its output goes to the descriptor ``stdout``. Returns its exit status."""
    found = _nodes(ray)
    if node not in found:
        print(f"ray: the cluster has no node {node!r}; it has {', '.join(found) or 'no other ones'}", file=sys.stderr)
        return LOST
    address = found[node]["NodeManagerAddress"]
    strategy = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 4}
    actor = (
        ray.remote(Remote).options(scheduling_strategy=strategy(found[node]["NodeID"], soft=False), **options).remote()
    )
    own, key = certificate()
    port, there = await actor.listen.remote(address, own, list(command))
    channels: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    for first in _CHANNELS:
        reader, writer = await asyncio.open_connection(address, port, ssl=context(own, key, there, server=False))
        break_if_silent(writer)
        writer.write(first)
        channels.append((reader, writer))
    (_, entry), (output, _), (errors, _), (ended, _) = channels
    given = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(given), sys.stdin)
    sending = asyncio.ensure_future(_send_all(given, entry))
    await asyncio.gather(_write_all(output, stdout), _write_all(errors, 2))
    sending.cancel()
    return int(await ended.read() or LOST)


async def _send_all(source: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await copy(source, writer)
    writer.close()


async def _write_all(reader: asyncio.StreamReader, descriptor: int) -> None:
    while data := await reader.read(_CHUNK):
        while data:
            data = data[os.write(descriptor, data) :]


def main() -> None:
    """Runs the program. Does not return."""
    address, *rest = sys.argv[1:]
    stdout = os.dup(1)
    os.dup2(2, 1)  # Ray prints messages, for example when a node is lost
    try:
        ray = _connected_to(address)
        if rest:
            status = asyncio.run(run(ray, rest[0], rest[1:], stdout))
        else:
            os.write(stdout, json.dumps(sorted(_nodes(ray))).encode())
            status = 0
    except Exception as error:  # noqa: BLE001 -- Ray and its connections may raise anything
        print(f"ray: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        status = LOST
    sys.stderr.flush()
    os._exit(status if 0 <= status <= LOST else LOST)


if __name__ == "__main__":
    main()
