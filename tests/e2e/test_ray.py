"""Hosts that are the nodes of a Ray cluster: two nodes on this machine."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from pydantic import JsonValue

from exo.serving.hosts import ray_cluster
from exo.serving.hosts.ray_cluster import ray_hosts, ray_python
from exo.worker.protocol.remote_host import HostsError, RemoteHost
from tests.e2e.test_hosts import BOTH, LOCAL, streamed, undisturbed
from tests.support.hosts import wait_until
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card
from tests.support.twins import write_twins

MODELS: dict[str, list[JsonValue]] = {LOCAL: ["local"], BOTH: ["three", "local"]}
_STRANGER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from ray_host import Remote, certificate, context

async def connected(identity, there, port, channel):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context(*identity, there, server=False))
    writer.write(channel)
    return reader, writer

async def got(*connection):
    try:
        reader, writer = await connected(*connection)
        return (await reader.read()).decode() or "nothing"
    except OSError:
        return "nothing"

async def main():
    own, other = certificate(), certificate()
    port, there = await Remote().listen("127.0.0.1", own[0], ["echo", "hello"])
    print(await got(other, there, port, b"output\\n"))
    print(await got(own, other[0], port, b"output\\n"))
    connections = [await connected(own, there, port, each) for each in (b"input\\n", b"errors\\n", b"status\\n")]
    print(await got(own, there, port, b"output\\n"))

asyncio.run(main())
"""


def _installed() -> bool:
    try:
        ray_python()
    except HostsError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _installed(), reason="Ray is not installed; pip install 'exo[ray]' does it")


@dataclass(frozen=True, slots=True)
class Cluster:
    address: str
    folder: Path
    variables: dict[str, str]

    def start(self, name: str, *arguments: str) -> psutil.Popen:
        program = (str(Path(ray_python()).with_name("ray")), "start", "--block", f"--node-name={name}")
        options = ("--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats", *arguments)
        with (self.folder / f"{name}.log").open("ab") as log:
            return psutil.Popen(
                (*program, *options),
                env={**os.environ, **self.variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @contextmanager
    def node(self, name: str) -> Generator[psutil.Popen]:
        """A node, which is up."""
        while True:
            with ending(self.start(name, f"--address={self.address}")) as process:
                wait_until(lambda: process.poll() is not None or name in names(self))
                if process.poll() is None:
                    yield process
                    return
                # Ray gives a node 30 s to start, which may not be enough on a busy machine.


@contextmanager
def ending(process: psutil.Popen) -> Generator[psutil.Popen]:
    """Ends a node with the context."""
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family = process.children(recursive=True)
            process.terminate()
            psutil.wait_procs(family, 30)
            for each in (*family, process):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster with the nodes "one", where this process is, and "two"."""
    with tempfile.TemporaryDirectory(prefix="exo-ray-", dir="/tmp") as name:  # paths of sockets must be short
        variables = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": name,
            "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }  # fmt: skip
        folder = Path(name)
        written = folder / "ray" / "ray_current_cluster"
        head = ("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}")
        with ending(Cluster("", folder, variables).start("one", *head)):
            wait_until(lambda: written.exists() and bool(written.read_text()))
            found = Cluster(written.read_text().strip(), folder, variables)
            with pytest.MonkeyPatch.context() as patch:
                for key, value in variables.items():
                    patch.setenv(key, value)
                with found.node("two"):
                    yield found


def names(cluster: Cluster) -> list[str]:
    try:
        return [each.name for each in ray_hosts(cluster.address)]
    except HostsError:
        return []


@pytest.fixture(scope="module")
def two(cluster: Cluster) -> RemoteHost:
    return next(each for each in ray_hosts(cluster.address) if each.name == "two")


def run(host: RemoteHost, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*host.run, *command], input=given, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )


def test_a_node_runs_a_program_with_its_pipes_here(two: RemoteHost) -> None:
    assert two.name == "two"
    program = "import sys; data = sys.stdin.read(); print(len(data)); print('aside', file=sys.stderr); sys.exit(7)"
    done = run(two, sys.executable, "-c", program, given="x" * 3_000_000)
    assert (done.stdout, done.stderr, done.returncode) == ("3000000\n", "aside\n", 7)
    assert run(two, "/nowhere/program").returncode == 127


def test_a_program_ends_with_the_command_here(two: RemoteHost) -> None:
    program = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    with subprocess.Popen([*two.run, sys.executable, "-c", program], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        there = psutil.Process(int(process.stdout.readline()))
        process.kill()
        assert there.wait(DEADLINE_SECONDS) is None


def test_what_is_no_node_is_named(two: RemoteHost) -> None:
    *words, _ = two.run
    done = subprocess.run([*words, "four", "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 255
    assert "the cluster has no node 'four'; it has " in done.stderr
    assert "two" in done.stderr


def test_a_server_without_the_token_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with pytest.raises(HostsError, match="--ray: "):
        ray_hosts(cluster.address)


def test_a_stranger_gets_no_connection_of_a_program() -> None:
    folder = str(Path(ray_cluster.__file__).parent)
    done = subprocess.run([ray_python(), "-c", _STRANGER, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["nothing", "nothing", "hello"]


def test_a_model_is_served_by_a_node_and_goes_on_here_when_the_node_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    table = write_twins(tmp_path)["cuda"]
    for name, hosts in MODELS.items():
        write_card(tmp_path, name, {"cuda": table}, hosts=hosts)
    with cluster.node("three") as node, ServeProgram(tmp_path, "--ray", cluster.address) as server:
        wait_until(lambda: 'exo:host_up{host="three"} 1.0' in server.client.get("/metrics").text)
        expected = undisturbed(server)

        def lose() -> None:
            assert hosts_of_instances(server) == {"three"}
            for each in node.children(recursive=True):
                each.kill()

        assert streamed(server, BOTH, lose) == expected
        assert 'exo:host_up{host="three"} 0.0' in server.client.get("/metrics").text
        assert "" in hosts_of_instances(server)


def hosts_of_instances(server: ServeProgram) -> set[str]:
    data = server.client.get("/v1/instances").json()["data"]
    return {each["host"] or "" for each in data if each["model"] == f"test/{BOTH}"}


def test_a_cluster_that_is_not_there_is_named() -> None:
    with pytest.raises(HostsError, match="--ray: there is no way into the cluster"):
        ray_hosts("nonsense")
