"""Processes that hold parts of a runner's model, on this host or on another one: how each side knows that both live.

The runner starts them and writes lines to their standard input, at least one every few seconds. A part ends when its
input closes, or is silent because the network to its host is broken. The runner ends when a part does: it cannot
compute without it, and the server handles the death of a runner.
"""

import ipaddress
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import final

from exo.worker.protocol.commands import Peer
from exo.worker.protocol.wire import exit_now
from exo.worker.runner_common.load_error import LoadError

BEAT_SECONDS = 2.0
"""Time between two empty lines, which say that the runner lives."""
SILENCE_SECONDS = 20.0
"""Time without a line after which a part ends. A broken network may close no pipe for hours."""
_END_SECONDS = 5.0
"""Time for a part to exit at the end."""


@final
class PartProcess:
    """The runner's side. ``name`` is for messages, such as "host gpu2"."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts ``command``; ``environment`` is added to this process's. Raises LoadError."""
        self.name = name
        pipe, variables = subprocess.PIPE, {**os.environ, **(environment or {})}
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=variables)
        except OSError as error:
            raise self.could_not("start", str(error)) from error
        self._needed = False
        self._ended = threading.Event()
        self._waiting = threading.Thread(target=self._wait, name=name, daemon=True)
        self._waiting.start()
        threading.Thread(target=self._beat, name=f"beats to {name}", daemon=True).start()

    def say(self, line: bytes) -> None:
        """Writes a line. A process that has ended does not get it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def line(self) -> str:
        """Waits for the next line of its output, and returns it; empty if it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode(errors="replace").strip()

    def could_not(self, what: str, said: str) -> LoadError:
        """Makes the error for a process that could not do ``what``. ``said`` is the reason; empty if it has ended."""
        return LoadError("model_load_failed", f"{self.name} could not {what}: {said or f'it {self._how()}'}")

    def need(self) -> None:
        """From now on, its end is the end of this process."""
        self._needed = True
        if self._ended.is_set():
            self._fail()

    def blame(self, seconds: float) -> None:
        """Waits until its end has been noticed, which ends this process if it is needed."""
        self._waiting.join(seconds)

    def end(self) -> None:
        """Closes its input, and waits until it has ended."""
        self._needed = False
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self._ended.wait(_END_SECONDS):
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _wait(self) -> None:
        self._process.wait()
        self._ended.set()
        if self._needed:
            self._fail()

    def _fail(self) -> None:
        print(f"{self.name} {self._how()}; the runner cannot compute without it", file=sys.stderr)
        exit_now(1)

    def _beat(self) -> None:
        with suppress(ValueError):  # ``end`` has closed the pipe
            while not self._ended.wait(BEAT_SECONDS):
                self.say(b"\n")

    def _how(self) -> str:
        """Waits for its end, and returns how it ended."""
        code = self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def lines_while_needed() -> Iterator[bytes]:
    """The part's side: yields the lines of standard input. Ends when it closes or is silent."""
    rest = b""
    while select.select([0], [], [], SILENCE_SECONDS)[0] and (data := os.read(0, 1 << 16)):
        *lines, rest = (rest + data).split(b"\n")
        yield from filter(None, lines)


def check_private(address: str) -> None:
    """Raises LoadError unless engines may talk to each other at an address: it must be one of a private network."""
    try:
        found = ipaddress.IPv4Address(address)
    except ValueError as error:
        raise LoadError("model_load_failed", f"{address!r} is no IPv4 address, as the engines need") from error
    if found.is_global or found.is_unspecified or found.is_multicast:
        reason = "engines talk to each other without encryption and passwords"
        remedy = "give the hosts a cable or a WireGuard network of their own"
        raise LoadError("model_load_failed", f"{address} is no address of a private network, and {reason}: {remedy}")


def own_address(peers: Sequence[Peer]) -> str:
    """Returns this host's address in the private network of its peers' addresses. Raises LoadError."""
    for peer in peers:
        check_private(peer.address)
    peer = peers[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probing:
        try:
            probing.connect((peer.address, 9))  # sends nothing
        except OSError as error:
            message = f"there is no way to {peer.address}, the address of host {peer.name}: {error.strerror}"
            raise LoadError("model_load_failed", message) from error
        return str(probing.getsockname()[0])


@contextmanager
def reserved(address: str) -> Generator[str]:
    """Yields this host's ``address`` with a port, "10.0.0.2:41234", which no other program gets meanwhile.

    The port is bound but not listened on. Linux then gives it to no other program, except to a library that asks for it
    by number.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((address, 0))
        yield f"{address}:{held.getsockname()[1]}"
