"""Models on devices with memory of their own, which llama.cpp takes for GPUs: where they are, and what they take."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import LoadOption
from exo.worker.runner_cuda.loading.estimate import DEVICE_CONTEXT
from tests.support.program import Program, ask
from tests.support.rpc_devices import RpcDevice, llama_command, rpc_devices
from tests.support.tiny import Shape, write_gguf

GIB, MIB = 1 << 30, 1 << 20
EXACT: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "threads": 1, "n_ctx": 512, "slots": 4}


@pytest.fixture(scope="module")
def devices() -> Iterator[list[RpcDevice]]:
    with rpc_devices(2 * GIB, 1 * GIB) as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_gguf(folder / "llama.gguf", Shape("llama", layers=6, heads=4, kv_heads=4, head_dim=64))
    return folder


def load(path: Path, backend: str = "LlamaCppCuda", **table: JsonValue) -> Load:
    return Load(model_id="test/tiny", backend=backend, table={**EXACT, "path": str(path), **table})


def start() -> Program:
    """A runner that has the devices of the fixture, if there is one."""
    return Program(llama_command("LlamaCppCpu"))


def generated(program: Program) -> list[list[int]]:
    requests = [ask(f"{at}", "once upon a time" * at, temperature=at % 2, seed=at) for at in range(1, 5)]
    return [each.tokens for each in program.generate(*requests)]


@pytest.fixture(scope="module")
def expected(models: Path) -> list[list[int]]:
    """What the model generates on the CPU."""
    with start() as program:
        program.load(load(models / "llama.gguf", "LlamaCppCpu"))
        return generated(program)


TABLES: tuple[tuple[dict[str, Any], list[str]], ...] = (
    ({}, ["RPC0", "RPC1"]),
    ({"n_gpu_layers": 4}, ["RPC0", "RPC1"]),
    ({"tensor_split": [1, 3], "devices": ["RPC1", "RPC0"]}, ["RPC1", "RPC0"]),
    ({"devices": ["RPC1"]}, ["RPC1"]),
    ({"split_mode": "none", "main_gpu": 1}, ["RPC1"]),
    ({"split_mode": "tensor"}, ["RPC0", "RPC1"]),
    ({"backend_sampling": "on"}, ["RPC0", "RPC1"]),
    ({"devices": ["CPU"]}, ["CPU"]),
)


@pytest.mark.parametrize(("table", "names"), TABLES)
def test_a_model_is_on_the_devices_of_its_card_alone_and_generates_what_it_does_on_the_cpu(
    models: Path, devices: list[RpcDevice], expected: list[list[int]], table: dict[str, Any], names: list[str]
) -> None:
    for each in devices:
        each.wait_until_empty()
    with start() as program:
        assert program.load(load(models / "llama.gguf", **table)).devices == tuple(names)
        used = [each.used() for each in devices]
        assert generated(program) == expected
    assert [size > 0 for size in used] == ["RPC0" in names, "RPC1" in names]


def test_a_model_that_does_not_fit_a_device_is_refused_by_llama_cpp_and_by_its_estimate(models: Path) -> None:
    with Program(llama_command("LlamaCppCuda", 64 * MIB)) as program:
        command = load(models / "llama.gguf", n_ctx=4096, slots=4)
        assert planned(program, command).devices["RPC0"] > DEVICE_CONTEXT + 64 * MIB
        program.send(command)
        program.until(lambda: program.failure is not None)
        assert program.failure is not None
        assert program.failure.code == "out_of_memory"


def test_the_self_test_proves_each_device(devices: list[RpcDevice]) -> None:
    command = [sys.executable, "-m", "exo.worker.runner_cuda", "--self-test"]
    proofs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [(each["device"], each["failure"]) for each in proofs] == [("RPC0", ""), ("RPC1", "")]
    assert min(each["on_device"] for each in proofs) > 0.95


def planned(program: Program, command: Load) -> LoadOption:
    program.send(Estimate(load=command))
    program.until(lambda: program.estimated is not None)
    assert program.estimated is not None
    return program.estimated.choices[0]
