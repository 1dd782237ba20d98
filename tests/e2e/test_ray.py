"""Hosts that are the nodes of a Ray cluster: two nodes on this machine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pydantic import JsonValue

from exo.serving.hosts import ray_host
from exo.serving.hosts.ray_cluster import ray_hosts, ray_python
from exo.worker.protocol.remote_host import HostsError, RemoteHost
from tests.e2e.test_hosts import BOTH, LOCAL, streamed, undisturbed
from tests.support.hosts import wait_until
from tests.support.program import DEADLINE_SECONDS
from tests.support.ray_nodes import RayCluster, ray_cluster, why_no_ray
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


pytestmark = pytest.mark.skipif(bool(why_no_ray()), reason=why_no_ray())


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A cluster with the head node, where this process is, and "two"."""
    with ray_cluster() as found, found.node("two"):
        yield found


@pytest.fixture(scope="module")
def two(cluster: RayCluster) -> RemoteHost:
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


def test_a_server_without_the_token_is_refused(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with pytest.raises(HostsError, match="--ray: "):
        ray_hosts(cluster.address)


def test_a_stranger_gets_no_connection_of_a_program() -> None:
    folder = str(Path(ray_host.__file__).parent)
    done = subprocess.run([ray_python(), "-c", _STRANGER, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["nothing", "nothing", "hello"]


def test_a_model_is_served_by_a_node_and_goes_on_here_when_the_node_is_lost(
    cluster: RayCluster, tmp_path: Path
) -> None:
    table = write_twins(tmp_path)["cuda"]
    for name, hosts in MODELS.items():
        write_card(tmp_path, name, {"cuda": table}, hosts=hosts)
    with cluster.node("three") as node, ServeProgram(tmp_path, "--ray", cluster.address) as server:
        wait_until(lambda: 'exo:host_up{host="three"} 1.0' in server.client.get("/metrics").text)
        expected = undisturbed(server)

        def lose() -> None:
            assert hosts_of_instances(server) == {"three"}
            for each in node.children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # some end with their parent
                    each.kill()

        assert streamed(server, BOTH, lose) == expected
        wait_until(lambda: 'exo:host_up{host="three"} 0.0' in server.client.get("/metrics").text)
        assert "" in hosts_of_instances(server)


def hosts_of_instances(server: ServeProgram) -> set[str]:
    data = server.client.get("/v1/instances").json()["data"]
    return {each["host"] or "" for each in data if each["model"] == f"test/{BOTH}"}


def test_the_cluster_of_this_machine_is_found(cluster: RayCluster) -> None:
    assert "two" in [each.name for each in ray_hosts("auto")]


def test_a_cluster_that_is_not_there_is_named() -> None:
    with pytest.raises(HostsError, match="--ray: there is no way into the cluster"):
        ray_hosts("nonsense")
