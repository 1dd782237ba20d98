"""Models on devices with memory of their own, which llama.cpp takes for GPUs: where they are, and what they take."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Embed, Estimate, Load
from exo.worker.protocol.events import LoadOption
from exo.worker.runner_cuda.loading.gguf_sizes import DEVICE_CONTEXT
from tests.support.program import Program, ask
from tests.support.rpc_devices import RpcDevice, llama_command, rpc_devices
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.shape import Architecture

GIB, MIB = 1 << 30, 1 << 20
SPARE = 12 * MIB
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
    ({"kv": "pool", "n_ctx": 2048}, ["RPC0", "RPC1"]),
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
    command = [sys.executable, "-m", "exo.worker.runner_cuda", "--self-test", "LlamaCppCuda"]
    proofs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [(each["device"], each["failure"]) for each in proofs] == [("RPC0", ""), ("RPC1", "")]
    assert min(each["on_device"] for each in proofs) > 0.95


MEASURED: tuple[tuple[Architecture, dict[str, Any]], ...] = (
    ("gemma3", {}),
    ("gemma3", {"n_gpu_layers": 5}),
    ("llama", {"tensor_split": [3, 1], "backend_sampling": "on"}),
    ("llama", {"split_mode": "tensor"}),
    ("llama", {"devices": ["RPC1"], "flash_attn": "off"}),
    ("llama", {"kv": "pool"}),
    ("llama", {"kv": "pool", "devices": ["RPC1"], "flash_attn": "off"}),
)


@pytest.mark.parametrize(("architecture", "table"), MEASURED)
def test_the_estimate_for_each_device_is_what_is_allocated_there(
    tmp_path: Path, devices: list[RpcDevice], architecture: Architecture, table: dict[str, Any]
) -> None:
    """After loading, and with the buffers of all kinds of requests."""
    path = tmp_path / "wide.gguf"
    wide = Shape(
        architecture, layers=8, hidden=256, feed_forward=1408, heads=8, kv_heads=8, head_dim=64, sliding_window=512
    )
    write_gguf(path, wide)
    command = load(path, n_ctx=4096, slots=2, cache_type_k="f16", cache_type_v="f16", **table)
    for each in devices:
        each.wait_until_empty()
    with start() as program:
        plan = planned(program, command)
        program.load(command.model_copy(update={"table": {**command.table, **plan.settings}}))
        loaded = [each.used() for each in devices]
        program.generate(ask("scored", max_tokens=1).model_copy(update={"prompt_logprobs": 1}))
        program.generate(Embed(id="text", prompt=(5, 6, 7)))
        used = [each.used() for each in devices]
    for at, name in enumerate(("RPC0", "RPC1")):
        total = plan.devices.get(name, DEVICE_CONTEXT) - DEVICE_CONTEXT
        at_first = total - plan.later_devices.get(name, 0)
        for estimated, allocated in ((at_first, loaded[at]), (total, used[at])):
            assert 0.97 * allocated - MIB <= estimated <= 1.03 * allocated + SPARE, (name, plan.parts)


def planned(program: Program, command: Load) -> LoadOption:
    program.send(Estimate(load=command))
    program.until(lambda: program.estimated is not None)
    assert program.estimated is not None
    return program.estimated.choices[0]
