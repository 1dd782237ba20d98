"""A model that no host has room for is divided among two, whose devices have memory of their own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import JsonValue

from exo.worker.runner_cuda.loading.gguf_sizes import DEVICE_CONTEXT
from tests.support.hosts import FakeHost, wait_until
from tests.support.rpc_devices import RpcDevice, rpc_devices, variables
from tests.support.server import ServeProgram, long_story, write_card
from tests.support.tiny import Shape, write_gguf

SHAPE = Shape("llama", layers=6, heads=4, kv_heads=4, head_dim=64, context_length=8192)
ROOM = DEVICE_CONTEXT + (94 << 20)
"""The KV cache takes 96 MiB beside what CUDA itself would take."""
BODY = long_story(600)


@pytest.fixture(scope="module")
def far() -> Iterator[RpcDevice]:
    """The device of the other host."""
    device = RpcDevice(ROOM)
    yield device
    device.process.communicate()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, far: RpcDevice) -> FakeHost:
    (variable,) = (f"{name}={value}" for name, value in variables([far]).items())
    return FakeHost(tmp_path_factory.mktemp("hosts"), "gpu2", variable)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, host: FakeHost) -> Iterator[ServeProgram]:
    home: Path = tmp_path_factory.mktemp("home")
    write_gguf(home / "tiny.gguf", SHAPE)
    table: dict[str, JsonValue] = {
        "path": str(home / "tiny.gguf"), "threads": 1, "slots": 1, "n_ctx": 8192, "n_ubatch": 32, "n_gpu_layers": -1,
        "prefix_cache_bytes": 0, "cache_type_k": "f32", "cache_type_v": "f32",
    }  # fmt: skip
    write_card(home, "whole", {"cuda": table}, backends=["LlamaCppCpu"], hosts=["local"])
    cards: dict[str, dict[str, JsonValue]] = {
        "large": {}, "undivided": {"divide": []}, "wrong": {"divide": ["gpu7"]}, "small": {"divide": ["gpu2"]},
    }  # fmt: skip
    for name, keys in cards.items():
        settings = {**table, "n_ctx": 512} if name == "small" else table
        write_card(home, name, {"cuda": settings}, backends=["LlamaCppCuda"], **keys)
    (home / "hosts.toml").write_text(f'[gpu2]\nrun = {json.dumps(host.run)}\naddress = "127.0.0.1"\n')
    with rpc_devices(ROOM), ServeProgram(home) as program:
        yield program
    wait_until(lambda: not [*host.processes()])


def undisturbed(server: ServeProgram) -> str:
    reply = server.complete("whole", **BODY)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def instance(server: ServeProgram, model: str) -> dict[str, Any]:
    data = server.client.get("/v1/instances").json()["data"]
    (found,) = [each for each in data if each["model"] == f"test/{model}"]
    return found


def lenders(host: FakeHost) -> list[psutil.Process]:
    """The processes that lend the host's devices."""
    return [each for each in host.processes() if "--rpc-server" in each.cmdline()]


def streamed(server: ServeProgram, model: str, disturb: Callable[[], None]) -> str:
    text, disturbed = "", False
    with server.client.stream("POST", "/v1/completions", json={"model": model, "stream": True, **BODY}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if len(text) > 20 and not disturbed:
                    disturb()
                    disturbed = True
    assert disturbed
    return text


def test_a_model_that_fits_no_host_alone_is_on_both_and_its_text_is_the_same(
    server: ServeProgram, host: FakeHost, far: RpcDevice
) -> None:
    reply = server.complete("large", **BODY)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["text"] == undisturbed(server)
    found = instance(server, "large")
    assert found["layers"].keys() == {"RPC0", "gpu2/RPC0"}
    assert sum(found["layers"].values()) == 7
    counted = found["plan"]["memory"]
    assert counted.keys() == {"memory", "RPC0", "gpu2/RPC0", "gpu2/memory"}
    assert 0 < far.used() <= counted["gpu2/RPC0"] <= ROOM
    assert lenders(host)


def test_a_stream_goes_on_when_the_process_that_lends_the_device_is_killed(
    server: ServeProgram, host: FakeHost
) -> None:
    def kill() -> None:
        for each in lenders(host):
            each.kill()

    assert streamed(server, "large", kill) == undisturbed(server)


def test_a_model_card_may_name_the_hosts_or_forbid_it(server: ServeProgram) -> None:
    reply = server.complete("small", max_tokens=4)
    assert reply.status_code == 200, reply.text
    assert "gpu2/RPC0" in instance(server, "small")["layers"]
    refused = server.complete("undivided")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
    refused = server.complete("wrong")
    assert "there is no host gpu7 in hosts.toml" in refused.json()["error"]["message"]
