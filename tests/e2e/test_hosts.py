"""One server, and runners on other hosts: they answer as here, and a stream survives the loss of its host."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import JsonValue

import exo
from tests.support.hosts import FakeHost, wait_until, write_hosts
from tests.support.hub import REPO, LocalHub
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, environment, long_story, write_card
from tests.support.ssh_host import SshHost
from tests.support.tiny import Shape, write_gguf
from tests.support.twins import write_twins

TOKENS = 1500
BODY = long_story(TOKENS)
LOCAL, THERE, BOTH = "local", "there", "both"
"""Model cards: for this machine, for the other host, and for the other host and then this machine."""
HOSTS: dict[str, list[JsonValue]] = {LOCAL: ["local"], THERE: ["gpu2"], BOTH: ["gpu2", "local"]}


def served(home: Path, host: FakeHost | SshHost) -> Iterator[ServeProgram]:
    """A server with the models of ``HOSTS``. After it, no process of its own stays on the host."""
    table = write_twins(home)["cuda"]
    for name, hosts in HOSTS.items():
        write_card(home, name, {"cuda": table}, hosts=hosts)
    write_hosts(home, host)
    with ServeProgram(home) as program:
        yield program
    wait_until(lambda: not [*host.processes()])


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> FakeHost:
    return FakeHost(tmp_path_factory.mktemp("hosts"), "gpu2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, host: FakeHost) -> Iterator[ServeProgram]:
    yield from served(tmp_path_factory.mktemp("home"), host)


@pytest.fixture(autouse=True)
def is_up(server: ServeProgram) -> None:
    """An earlier test may have ended the host."""
    wait_until(lambda: 'exo:host_up{host="gpu2"} 1.0' in server.client.get("/metrics").text)


def undisturbed(server: ServeProgram) -> str:
    reply = server.complete(LOCAL, **BODY)
    assert reply.status_code == 200, reply.text
    assert "x-exo-host" not in reply.headers
    return reply.json()["choices"][0]["text"]


def streamed(server: ServeProgram, model: str, disturb: Callable[[], None], at: int = 10) -> str:
    """The text of a stream that is disturbed when ``at`` pieces of it have come."""
    pieces: list[str] = []
    with server.client.stream("POST", "/v1/completions", json={"model": model, "stream": True, **BODY}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                pieces.append(chunk["choices"][0]["text"])
                if len(pieces) == at:
                    disturb()
    return "".join(pieces)


def test_a_model_of_another_host_answers_as_here(server: ServeProgram, host: FakeHost) -> None:
    reply = server.complete(THERE, **BODY)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-exo-host"] == "gpu2"
    assert reply.json()["choices"][0]["text"] == undisturbed(server)
    (instance,) = (each for each in server.client.get("/v1/instances").json()["data"] if each["host"])
    (runner,) = host.runners()
    assert instance["model"] == f"test/{THERE}"
    wait_until(lambda: pid_of(server, THERE) == runner.pid)


def pid_of(server: ServeProgram, name: str) -> int | None:
    data = server.client.get("/v1/instances").json()["data"]
    return next((each["pid"] for each in data if each["model"] == f"test/{name}"), None)


def test_a_stream_goes_on_there_when_its_runner_is_killed(server: ServeProgram, host: FakeHost) -> None:
    def kill() -> None:
        for each in host.runners():
            each.kill()

    assert streamed(server, THERE, kill) == undisturbed(server)


def test_a_stream_goes_on_here_when_its_host_is_gone(server: ServeProgram, host: FakeHost) -> None:
    assert streamed(server, BOTH, lambda: host.signal(signal.SIGKILL)) == undisturbed(server)
    # The host is tried again, and serves what only it may.
    wait_until(lambda: server.complete(THERE, **BODY).status_code == 200)


def test_a_stream_waits_for_the_only_host_that_may_serve_it(server: ServeProgram, host: FakeHost) -> None:
    assert streamed(server, THERE, lambda: host.signal(signal.SIGKILL)) == undisturbed(server)


def test_a_host_that_falls_silent_is_left(server: ServeProgram, host: FakeHost) -> None:
    """Nothing ends, and nothing answers."""
    stopped: list[int] = []

    def stop() -> None:
        stopped.extend(each.pid for each in host.processes())
        host.signal(signal.SIGSTOP)

    try:
        assert streamed(server, BOTH, stop) == undisturbed(server)
        wait_until(lambda: bool({each.pid for each in host.processes()} - {*stopped}))  # the host is tried again
    finally:
        host.signal(signal.SIGCONT)
    wait_until(lambda: not {each.pid for each in host.processes()} & {*stopped})


def test_a_model_without_a_host_is_refused_by_name(server: ServeProgram, host: FakeHost) -> None:
    home = Path(str(server.log)).parent
    write_card(home, "nowhere", write_twins(home), hosts=["gpu9"])
    wait_until(lambda: server.complete("nowhere").status_code != 404)
    error = server.complete("nowhere").json()["error"]
    assert error["code"] == "runner_unavailable"
    assert "no host is called gpu9" in error["message"]


def test_a_second_instance_is_loaded_on_the_other_host_when_all_slots_are_busy(tmp_path: Path) -> None:
    other = FakeHost(tmp_path, "gpu2")
    table = write_twins(tmp_path, slots=1)["cuda"]
    write_card(tmp_path, "tiny", {"cuda": table})
    write_hosts(tmp_path, other)
    with ServeProgram(tmp_path) as server, ThreadPoolExecutor(4) as pool:
        done = [False]

        def ask(number: int) -> str | None:
            """Asks again and again, until there are two instances."""
            while not done[0]:
                reply = server.complete("tiny", **{**BODY, "seed": number})
                assert reply.status_code == 200, reply.text
                if reply.headers.get("x-exo-host") == "gpu2":
                    done[0] = True
                    return reply.json()["choices"][0]["text"]
            return None

        texts = [*pool.map(ask, range(4))]
        hosts = sorted(each["host"] for each in server.client.get("/v1/instances").json()["data"])
        assert hosts == ["", "gpu2"]
        number = next(number for number, text in enumerate(texts) if text is not None)
        assert all_equal(server, number, texts[number])
        assert repeated_where_its_prefix_is(server)
    wait_until(lambda: not [*other.processes()])


def all_equal(server: ServeProgram, seed: int, text: str | None) -> bool:
    """Whether both instances give this text, which a request alone gets from the one that has its prefix."""
    replies = [server.complete("tiny", **{**BODY, "seed": seed}) for _ in range(2)]
    return all(each.json()["choices"][0]["text"] == text for each in replies)


def repeated_where_its_prefix_is(server: ServeProgram) -> bool:
    """Whether a request that one instance has served goes there again when both are idle."""
    request = {"prompt": "a story that one of them knows", "max_tokens": 2}
    busy = {"model": "tiny", "stream": True, **BODY, "prompt": "a slot is busy"}
    with server.client.stream("POST", "/v1/completions", json=busy):
        first = server.complete("tiny", **request)
    again = server.complete("tiny", **request)
    cached = again.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached > 0 and first.headers.get("x-exo-host") == again.headers.get("x-exo-host")


def test_nothing_stays_on_the_host_when_the_server_is_killed(tmp_path: Path) -> None:
    other = FakeHost(tmp_path, "gpu2")
    write_card(tmp_path, "tiny", {"cuda": write_twins(tmp_path)["cuda"]}, hosts=["gpu2"])
    write_hosts(tmp_path, other)
    with ServeProgram(tmp_path) as server:
        assert server.complete("tiny", max_tokens=2).status_code == 200
        assert other.runners()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(DEADLINE_SECONDS)
        wait_until(lambda: not [*other.processes()])


def test_a_host_that_cannot_be_reached_is_named_with_the_reason(tmp_path: Path) -> None:
    broken = FakeHost(tmp_path, "gpu2")
    broken.run = ["sh", "-c", "echo no route to gpu2 >&2; exit 255"]
    write_card(tmp_path, "tiny", {"cuda": write_twins(tmp_path)["cuda"]})
    write_card(tmp_path, "there", {"cuda": write_twins(tmp_path)["cuda"]}, hosts=["gpu2"])
    write_hosts(tmp_path, broken)
    with ServeProgram(tmp_path) as server:
        assert server.complete("tiny", max_tokens=2).status_code == 200
        message = server.complete("there").json()["error"]["message"]
        assert "host gpu2 cannot be reached: no route to gpu2" in message


def test_a_model_is_downloaded_on_the_host_that_serves_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    with LocalHub() as hub:
        hub.commit({"tiny.gguf": tmp_path / "tiny.gguf"})
        other = FakeHost(tmp_path, "gpu2", f"HF_ENDPOINT={hub.url}")
        write_card(tmp_path, "tiny", {"cuda": {"repo": REPO, "file": "tiny.gguf", "threads": 1}}, hosts=["gpu2"])
        write_hosts(tmp_path, other)
        with ServeProgram(tmp_path) as server:
            error = server.complete("tiny", max_tokens=2).json()["error"]
            assert error["code"] == "model_not_downloaded"
            assert "on host gpu2" in error["message"]
        with ServeProgram(tmp_path, "--auto-pull") as server:
            reply = server.complete("tiny", max_tokens=2)
            assert reply.headers["x-exo-host"] == "gpu2", reply.text
    assert [*other.home.rglob("tiny.gguf")]
    assert [*(tmp_path / "models").rglob("tiny.gguf")] == []


def test_without_hosts_nothing_of_them_is_there(tmp_path: Path) -> None:
    """A Ray that cannot be imported shows that nobody tries."""
    (tmp_path / "ray.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    write_card(tmp_path, "tiny", {"cuda": write_twins(tmp_path)["cuda"]})
    with ServeProgram(tmp_path, PYTHONPATH=path) as server:
        reply = server.complete("tiny", max_tokens=2)
        assert reply.status_code == 200, reply.text
        assert "x-exo-host" not in reply.headers
        assert "exo:host_up" not in server.client.get("/metrics").text


def test_commands_without_a_server_ask_the_hosts(tmp_path: Path) -> None:
    there, broken = FakeHost(tmp_path, "gpu2"), FakeHost(tmp_path, "gpu3")
    broken.run = ["sh", "-c", "echo no route to gpu3 >&2; exit 255"]
    write_card(tmp_path, "tiny", {"cuda": write_twins(tmp_path)["cuda"]}, hosts=["gpu3", "gpu2"])
    write_hosts(tmp_path, there, broken)
    assert "host gpu2" in program(tmp_path, "route", "tiny")
    text = program(tmp_path, "doctor")
    assert "-- host gpu2\nhost      Linux" in text
    assert "-- host gpu3 cannot be reached: no route to gpu3" in text


def test_other_versions_are_told(tmp_path: Path) -> None:
    """Host gpu2 has another exo and is left out; gpu3 has another llama.cpp and serves."""
    old, other = FakeHost(tmp_path, "gpu2"), FakeHost(tmp_path, "gpu3")
    change_output(old, f's/"version":"{exo.__version__}"/"version":"0.0.1"/')
    change_output(other, 's/"engine":"llama.cpp","version":"[^"]*"/"engine":"llama.cpp","version":"b1"/')
    reason = f"host gpu2 has exo 0.0.1, and this machine exo {exo.__version__}: install the same there"
    differs = "host gpu3 has llama.cpp b1, and this machine "
    table = write_twins(tmp_path)["cuda"]
    write_card(tmp_path, "old", {"cuda": table}, hosts=["gpu2"])
    write_card(tmp_path, "other", {"cuda": table}, hosts=["gpu3"])
    write_hosts(tmp_path, old, other)
    doctor = program(tmp_path, "doctor")
    assert reason in doctor
    assert differs in doctor
    with ServeProgram(tmp_path) as server:
        assert reason in server.complete("old").json()["error"]["message"]
        assert server.complete("other", max_tokens=2).headers["x-exo-host"] == "gpu3"
        shown = program(tmp_path, "ps", "--port", server.url.rpartition(":")[2])
        assert reason in shown
        assert differs in shown
        assert "cuda@gpu3" in shown


def change_output(host: FakeHost, command: str) -> None:
    """Has ``sed`` change what the programs of a host write."""
    host.run = ["sh", "-c", '"$@" | sed -u "$0"', command, *host.run]


def test_a_broken_file_of_hosts_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text("[gpu2]\nuser = 'me'\n")
    done = run(tmp_path, "serve", "--port", "0")
    assert done.returncode == 2
    assert "hosts.toml: gpu2.user" in done.stderr


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "exo", *arguments]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)


def program(home: Path, *arguments: str) -> str:
    done = run(home, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
