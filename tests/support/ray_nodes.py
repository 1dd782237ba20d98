"""Ray clusters for tests: nodes on this machine, or in the network namespaces of hosts."""

import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import psutil

from exo.serving.hosts.ray_cluster import ray_hosts, ray_python
from exo.worker.protocol.remote_host import HostsError
from tests.support.hosts import wait_until
from tests.support.ssh_host import SshHost

_HERE = "127.0.0.1"
_STARTS = 3
"""Ray gives a node 30 s to start, which may not be enough on a busy machine."""
_SMALL = (
    "--num-cpus=1",
    "--object-store-memory=80000000",
    "--disable-usage-stats",
    # Otherwise all nodes of a machine take the same ports.
    *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
)
_WATCHFUL = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_AGAIN = ("sh", "-c", 'while :; do "$@"; sleep 1; done', "sh")
"""Starts a command again whenever it has ended, as systemd does."""


def why_no_ray() -> str:
    """Why there can be no cluster; empty if there can."""
    try:
        ray_python()
    except HostsError as error:
        return str(error)
    return ""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """``variables`` are the environment of its nodes and of what connects to it."""

    address: str
    folder: Path
    variables: dict[str, str]

    @contextmanager
    def node(self, name: str, at: str = _HERE, prefix: Sequence[str] = ()) -> Generator[psutil.Popen]:
        """A node, which is up. ``prefix`` runs it."""
        with self.running(
            name, at, lambda: name in self.names(), f"--address={self.address}", prefix=prefix
        ) as process:
            yield process

    def names(self) -> list[str]:
        """The nodes that are up, except this machine's."""
        try:
            return [each.name for each in ray_hosts(self.address)]
        except HostsError:
            return []

    @contextmanager
    def running(
        self, name: str, at: str, is_up: Callable[[], bool], *arguments: str, prefix: Sequence[str] = ()
    ) -> Generator[psutil.Popen]:
        ray = str(Path(ray_python()).with_name("ray"))
        command = (*prefix, ray, "start", "--block", f"--node-name={name}", f"--node-ip-address={at}", *_SMALL)
        file = self.folder / f"{name}.log"
        for _ in range(_STARTS):
            with file.open("ab") as log:
                process = psutil.Popen(
                    (*command, *arguments),
                    env={**os.environ, **self.variables},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            with _ending(process):
                if _comes_up(process, is_up):
                    yield process
                    return
        raise AssertionError(file.read_text())


@contextmanager
def ray_cluster(at: str = _HERE, **variables: str) -> Generator[RayCluster]:
    """A cluster whose head node is here, at the address ``at``. This process has its variables meanwhile."""
    with tempfile.TemporaryDirectory(prefix="exo-ray-", dir="/tmp") as name:  # paths of sockets must be short
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": name}
        # Ray ends actors when a machine has no memory left, which others may have taken.
        variables = {**own, "RAY_memory_monitor_refresh_ms": "0", **variables}
        cluster = RayCluster("", Path(name), variables)
        written = cluster.folder / "ray" / "ray_current_cluster"
        head = ("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={cluster.folder / 'ray'}")

        def is_up() -> bool:
            return written.exists() and bool(written.read_text())

        with cluster.running("head", at, is_up, *head), patch.dict(os.environ, variables):
            yield replace(cluster, address=written.read_text().strip())


def _comes_up(process: psutil.Popen, is_up: Callable[[], bool]) -> bool:
    """Waits until it is up or has ended."""
    wait_until(lambda: process.poll() is not None or is_up())
    return process.poll() is None


@contextmanager
def _ending(process: psutil.Popen) -> Generator[psutil.Popen]:
    """Ends a node with the context."""
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family = [process, *process.children(recursive=True)]
            for each in family:
                with suppress(psutil.NoSuchProcess):
                    each.terminate()
            _, left = psutil.wait_procs(family, 30)
            for each in left:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()


class RayHost(SshHost):
    """A host that is also a node of a cluster. Its sessions are Ray's actors."""

    session = "ray::"

    @contextmanager
    def node(self, cluster: RayCluster) -> Generator[None]:
        """Its node, which is started again whenever Ray has given it up. The host must run."""
        subprocess.run(["ip", "-n", self.there, "route", "add", "default", "via", self.here], check=True)
        prefix = (*_AGAIN, "ip", "netns", "exec", self.there, *self.marked)
        with cluster.node(self.name, self.address, prefix):
            yield

    def processes(self) -> Iterator[psutil.Process]:
        """Those of exo, without Ray's own, which have the mark as well."""
        for each in super().processes():
            with suppress(psutil.Error):
                if any(word == "exo" or word.startswith("exo.") for word in each.cmdline()):
                    yield each


@contextmanager
def ray_of(hosts: Sequence[RayHost]) -> Generator[RayCluster]:
    """A cluster of hosts that run. It gives up a node that does not answer for four seconds."""
    with ExitStack() as stack:
        cluster = stack.enter_context(ray_cluster(hosts[0].here, **_WATCHFUL))
        for host in hosts:
            stack.enter_context(host.node(cluster))
        yield cluster
