"""A GGUF model divided among hosts by llama.cpp's RPC back end: the text is that of one host, and all end together.

The other hosts are programs on this machine, whose devices have memory of their own.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Load, Peer
from exo.worker.protocol.runners import RUNNERS
from tests.support.peers import CABLE, cable, needs_namespaces, parts, peer
from tests.support.program import DEADLINE_SECONDS, Program, ask, runner_command
from tests.support.rpc_devices import RpcDevice, rpc_devices, variables
from tests.support.tiny import Shape, write_gguf

MODULE = RUNNERS["cuda"].module
SERVER = "--rpc-server"
MIB = 1 << 20
EXACT: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "threads": 1, "n_ctx": 512, "slots": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama.gguf"
    write_gguf(path, Shape("llama", layers=6, heads=4, kv_heads=4, head_dim=64))
    return path


@pytest.fixture(scope="module")
def devices() -> Iterator[list[RpcDevice]]:
    """The devices of two other hosts."""
    with rpc_devices(2048 * MIB, 1024 * MIB) as found:
        yield found


def with_device(device: RpcDevice, name: str) -> Peer:
    """A host with one device."""
    (variable,) = (f"{key}={value}" for key, value in variables([device]).items())
    return peer(MODULE, ("env", variable), name=name)


def load(path: Path, *peers: Peer, **table: JsonValue) -> Load:
    return Load(model_id="test/tiny", backend="LlamaCppCpu", table={**EXACT, "path": str(path), **table}, peers=peers)


def start(*prefix: str) -> Program:
    """A runner on a host without devices."""
    return Program(("env", "--unset=EXO_TEST_RPC_SERVERS", *prefix, *runner_command(MODULE)))


def generated(program: Program) -> list[list[int]]:
    requests = [ask(f"{at}", "once upon a time" * at, temperature=at % 2, seed=at) for at in range(1, 5)]
    return [each.tokens for each in program.generate(*requests)]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What the model generates on one host."""
    with start() as program:
        program.load(load(model))
        return generated(program)


@pytest.mark.parametrize(
    ("table", "layers"),
    [
        ({"tensor_split": [1, 1]}, {"first/RPC0": 4, "second/RPC0": 3}),
        ({"n_gpu_layers": 4, "tensor_split": [1, 1]}, {"RAM": 3, "first/RPC0": 2, "second/RPC0": 2}),
        ({"devices": ["second/RPC0"]}, {"second/RPC0": 7}),
    ],
)
def test_layers_on_other_hosts_generate_what_one_host_does(
    model: Path,
    devices: list[RpcDevice],
    expected: list[list[int]],
    table: dict[str, JsonValue],
    layers: dict[str, int],
) -> None:
    hosts = [with_device(device, name) for device, name in zip(devices, ("first", "second"), strict=True)]
    for each in devices:
        each.wait_until_empty()
    with start() as program:
        found = program.load(load(model, *hosts, **table))
        assert found.layers == layers
        assert generated(program) == expected
        assert [each.used() > MIB for each in devices] == [f"{host}/RPC0" in layers for host in ("first", "second")]


def test_a_model_goes_on_the_hosts_that_have_room_for_it_and_no_account_is_exceeded(
    model: Path, devices: list[RpcDevice], expected: list[list[int]]
) -> None:
    hosts = [with_device(device, name) for device, name in zip(devices, ("first", "second"), strict=True)]
    command = load(model, *hosts, tensor_split=[1, 1])
    with start() as program:
        program.send(Estimate(load=command))
        program.until(lambda: program.estimated is not None)
        assert program.estimated is not None
        option = program.estimated.choices[0]
        assert option.devices.keys() == {"first/RPC0", "first/memory", "second/RPC0", "second/memory"}
        program.load(command.model_copy(update={"table": {**command.table, **option.settings}}))
        assert generated(program) == expected
        for host, device in zip(("first", "second"), devices, strict=True):
            assert 0 < device.used() <= option.devices[f"{host}/RPC0"]


def test_the_processors_of_a_host_without_gpus_compute(model: Path, expected: list[list[int]]) -> None:
    with start() as program:
        assert program.load(load(model, peer(MODULE), n_gpu_layers=3)).layers == {"RAM": 4, "far/memory": 3}
        assert generated(program) == expected
        assert program.shutdown() == 0


# --- all end together ---


def streaming(program: Program, command: Load) -> None:
    program.load(command)
    program.send(ask("endless", max_tokens=400))
    program.until(lambda: "endless" in program.results and len(program.results["endless"].tokens) > 3)


def test_a_server_that_dies_takes_the_runner_with_it(model: Path) -> None:
    with start() as program:
        streaming(program, load(model, peer(MODULE)))
        (server,) = parts(program.process.pid, SERVER)
        server.kill()
        assert program.drain() != 0
        assert program.results["endless"].end is None


def test_servers_do_not_outlive_a_runner_that_is_killed(model: Path) -> None:
    with start() as program:
        streaming(program, load(model, peer(MODULE)))
        (server,) = parts(program.process.pid, SERVER)
        program.process.kill()
        server.wait(DEADLINE_SECONDS)


@needs_namespaces
def test_a_broken_cable_ends_the_runner_and_the_server(model: Path) -> None:
    """No packet says that the connection is gone, and the program that runs others there notices nothing."""
    with cable() as hosts:
        far = peer(MODULE, hosts.prefix(hosts.there), address=CABLE[1])
        with start(*hosts.prefix(hosts.here)) as program:
            streaming(program, load(model, far, n_ctx=4096))
            (server,) = parts(program.process.pid, SERVER)
            hosts.cut()
            program.drain()
            assert program.results["endless"].end is None
            server.wait(DEADLINE_SECONDS)


# --- refusals ---


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("8.8.8.8", "8.8.8.8 is no address of a private network"),
        ("0.0.0.0", "0.0.0.0 is no address of a private network"),
        ("gpu2", "'gpu2' is no IPv4 address"),
        ("::1", "'::1' is no IPv4 address"),
    ],
)
def test_engines_talk_over_private_networks_only(model: Path, address: str, says: str) -> None:
    with start() as program:
        program.send(load(model, peer(MODULE, address=address)))
        assert program.drain() != 0
        assert program.failure is not None
        assert says in program.failure.message


SAYS = 'print(\'{"port": 1, "engine_version": "0.0.1", "devices": ["CUDA0"]}\'); input()'


@pytest.mark.parametrize(
    ("host", "says"),
    [
        (peer(MODULE, address="192.0.2.1"), "192.0.2.1 is no address of this host"),
        (Peer(name="far", command=("/nowhere",), address="127.0.0.1"), "host far could not start: .*No such file"),
        (Peer(name="far", command=("false",), address="127.0.0.1"), "RPC server: it exited with code 1"),
        (Peer(name="far", command=("echo", "hello"), address="127.0.0.1"), f"RPC server: hello {SERVER} 127.0.0.1"),
        (Peer(name="far", command=(sys.executable, "-c", SAYS), address="127.0.0.1"), "it has llama.cpp 0.0.1, and"),
    ],
)
def test_a_host_that_lends_no_devices_is_refused_with_the_reason(model: Path, host: Peer, says: str) -> None:
    with start() as program:
        program.send(load(model, host))
        assert program.drain() != 0
        assert program.failure is not None
        assert re.search(says, program.failure.message), program.failure.message
