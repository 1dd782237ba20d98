"""Other hosts for a runner. They are processes on this machine, or network namespaces where tests run as root."""

import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import psutil
import pytest

from exo.worker.protocol.commands import Peer

LOOPBACK = "127.0.0.1"
CABLE = ("198.18.0.1", "198.18.0.2")
"""The addresses of the two hosts of ``cable``, from the range that is reserved for tests of networks."""

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["ip", "-V"], capture_output=True, check=False).returncode != 0
    if sys.platform == "linux"
    else True,
    reason="network namespaces need Linux, root and iproute2",
)


def peer(
    module: str,
    prefix: Sequence[str] = (),
    *,
    name: str = "far",
    address: str = LOOPBACK,
    directories: Sequence[str] = (),
) -> Peer:
    """A host whose programs start with ``prefix``, and which has none of the devices of other tests."""
    command = ("env", "--unset=EXO_TEST_RPC_SERVERS", *prefix, sys.executable, "-X", "utf8", "-m", module)
    return Peer(name=name, command=command, address=address, directories=tuple(directories))


def parts(runner: int, option: str) -> list[psutil.Process]:
    """The runner's processes with parts of its model: those whose command line has the option."""
    return [each for each in psutil.Process(runner).children(recursive=True) if option in each.cmdline()]


class Cable:
    """Two network namespaces, ``here`` and ``there``, which a cable joins."""

    def __init__(self) -> None:
        self.here, self.there = (f"exo-{os.getpid()}-{number}" for number in (1, 2))

    def prefix(self, host: str) -> tuple[str, ...]:
        """Runs a program on one of the two hosts."""
        return ("ip", "netns", "exec", host)

    def cut(self) -> None:
        """The other end notices nothing: no packet says that the connections are gone."""
        _ip("-n", self.here, "link", "set", "cable1", "down")


@contextmanager
def cable() -> Generator[Cable]:
    """Two hosts with a cable between them, and no way elsewhere."""
    hosts = Cable()
    try:
        for host in (hosts.here, hosts.there):
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
        _ip("-n", hosts.here, "link", "add", "cable1", "type", "veth", "peer", "name", "cable2", "netns", hosts.there)
        for host, name, address in zip((hosts.here, hosts.there), ("cable1", "cable2"), CABLE, strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", name)
            _ip("-n", host, "link", "set", name, "up")
        yield hosts
    finally:
        for host in (hosts.here, hosts.there):
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
