"""A host behind real sshd in a network of its own, whose cable is cut under a stream."""

from collections.abc import Iterator

import pytest

from tests.e2e.test_hosts import BOTH, THERE, served, streamed, undisturbed
from tests.support.hosts import wait_until
from tests.support.server import ServeProgram
from tests.support.ssh_host import SshHost, server_namespace, why_not


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    if reason := why_not():
        pytest.skip(reason)
    with server_namespace() as namespace:
        host = SshHost(tmp_path_factory.mktemp("hosts"), "gpu2", namespace)
        with host.running():
            yield host


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, host: SshHost) -> Iterator[ServeProgram]:
    yield from served(tmp_path_factory.mktemp("home"), host)


def is_up(server: ServeProgram) -> bool:
    return 'exo:host_up{host="gpu2"} 1.0' in server.client.get("/metrics").text


def test_a_stream_survives_the_cut_of_the_cable_and_nothing_of_it_stays_there(
    server: ServeProgram, host: SshHost
) -> None:
    expected = undisturbed(server)
    wait_until(lambda: is_up(server))
    before: set[int] = set()

    def cut() -> None:
        before.update(each.pid for each in host.processes())
        host.cut()

    try:
        assert streamed(server, BOTH, cut) == expected
        assert not is_up(server)
    finally:
        host.mend()
    wait_until(lambda: is_up(server))
    wait_until(lambda: not {each.pid for each in host.processes()} & before)
    assert streamed(server, THERE, lambda: None) == expected


def test_a_stream_survives_the_end_of_its_session(server: ServeProgram, host: SshHost) -> None:
    assert streamed(server, THERE, host.end_sessions) == undisturbed(server)
