"""A host behind sshd in a network namespace of its own, joined to the server's by one cable that can be cut.

Needs root, iproute2 and OpenSSH's server and client (Debian: openssh-server).
"""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests import ROOT
from tests.support.hosts import FakeHost
from tests.support.program import DEADLINE_SECONDS

_SSHD = Path("/usr/sbin/sshd")
_NETWORK = 0x40000000
"""CLONE_NEWNET"""
_PORT = "2222"


def why_not() -> str:
    """Why there can be no such host; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "ssh", "ssh-keygen") if shutil.which(name) is None]:
        return f"{missing[0]} is not installed"
    if not _SSHD.exists():
        return "openssh-server is not installed"
    name = f"exo-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class SshHost(FakeHost):
    """``namespace`` is the server's. Each host of a server has another ``number``. ``here`` and ``address`` are the
    addresses of the cable's two ends.
    """

    session = "sshd"
    """How the name of a process begins that runs the programs of one connection."""

    def __init__(self, folder: Path, name: str, namespace: str, number: int = 0) -> None:
        super().__init__(folder, name)
        self.namespace, self.there = namespace, f"{namespace}-{number}"
        self._cable = f"cable{number}"
        self.here, self.address = f"198.18.{number}.1", f"198.18.{number}.2"
        self._folder = folder / f"{name}-sshd"
        self._folder.mkdir()
        options = ["UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "LogLevel=ERROR"]
        key = str(self._folder / "key")
        self._ssh = ["ssh", "-F", "/dev/null", "-i", key, "-p", _PORT, *(f"-o{each}" for each in options)]
        self._ssh.append(f"root@{self.address}")
        self.marked = (*self.run, f"PYTHONPATH={ROOT / 'src'}")
        self.run = [*self._ssh, "cd", str(ROOT), "&&", *self.marked]

    def cut(self) -> None:
        """Cuts the cable."""
        _ip("-n", self.namespace, "link", "set", self._cable, "down")

    def mend(self) -> None:
        """Joins it again."""
        _ip("-n", self.namespace, "link", "set", self._cable, "up")

    def end_sessions(self) -> None:
        """Kills the processes that have runners."""
        for runner in self.runners():
            with suppress(psutil.NoSuchProcess):
                next(each for each in runner.parents() if each.name().startswith(self.session)).kill()

    @contextmanager
    def running(self) -> Generator[None]:
        """The host's namespace, its cable and sshd."""
        _ip("netns", "add", self.there)
        try:
            far_end = ("type", "veth", "peer", "name", self._cable, "netns", self.there)
            _ip("-n", self.namespace, "link", "add", self._cable, *far_end)
            for name, address in ((self.namespace, self.here), (self.there, self.address)):
                _ip("-n", name, "address", "add", f"{address}/30", "dev", self._cable)
                for link in ("lo", self._cable):
                    _ip("-n", name, "link", "set", link, "up")
            with self._sshd():
                self._wait()
                yield
        finally:
            _ip("netns", "del", self.there)

    @contextmanager
    def _sshd(self) -> Generator[None]:
        folder = self._folder
        for key in (folder / "key", folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (folder / "authorized").write_bytes((folder / "key.pub").read_bytes())
        settings = {
            "AuthorizedKeysFile": folder / "authorized",
            "HostKey": folder / "host_key",
            "ListenAddress": f"{self.address}:{_PORT}",
            "PermitRootLogin": "prohibit-password",
            "PidFile": "none",
            "StrictModes": "no",
            "MaxStartups": "100",
        }
        (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        Path("/run/sshd").mkdir(exist_ok=True)
        inside = ("ip", "netns", "exec", self.there)
        with (folder / "sshd.log").open("wb") as log:
            command = [*inside, str(_SSHD), "-D", "-e", "-f", str(folder / "sshd_config")]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)

    def _wait(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        command = [*self._ssh, "true"]
        while (tried := subprocess.run(command, capture_output=True, check=False)).returncode:
            assert time.monotonic() < deadline, tried.stderr.decode()
            time.sleep(0.1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def server_namespace() -> Generator[str]:
    """A new network namespace, in which this thread and what it starts are meanwhile."""
    name = f"exo-{os.getpid()}"
    _ip("netns", "add", name)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{name}") as target:
            assert libc.setns(target.fileno(), _NETWORK) == 0, os.strerror(ctypes.get_errno())
            try:
                yield name
            finally:
                assert libc.setns(before.fileno(), _NETWORK) == 0, os.strerror(ctypes.get_errno())
    finally:
        _ip("netns", "del", name)
