"""A mixture of experts whose experts stay in RAM, on devices with memory of their own that llama.cpp takes for GPUs."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Embed, Estimate, Load
from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.runner_cuda.loading.gguf_sizes import DEVICE_CONTEXT
from tests.support.program import Program, ask
from tests.support.rpc_devices import RpcDevice, llama_command, rpc_devices
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.experts import write_experts

GIB, MIB = 1 << 30, 1 << 20
LAYERS, EXPERTS = 6, 8
SHAPE = Shape("qwen3", layers=LAYERS, heads=4, kv_heads=4, head_dim=64, hidden=256, feed_forward=512)
OF_A_LAYER = 3 * EXPERTS * 4 * SHAPE.hidden * SHAPE.feed_forward
"""Bytes of the experts of one layer."""
TOLERANCE = 0.1
FULL = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "experts.gguf"
    write_experts(path, SHAPE, EXPERTS)
    return path


@pytest.fixture(scope="module")
def devices() -> Iterator[list[RpcDevice]]:
    with rpc_devices(2 * GIB, 1 * GIB) as found:
        yield found


def load(path: Path, backend: str = "LlamaCppCuda", **table: JsonValue) -> Load:
    own = {"path": str(path), "cache_type_k": "f32", "cache_type_v": "f32", "threads": 1, "n_ctx": FULL, "slots": 4}
    own["kv"] = "split"
    return Load(model_id="test/experts", backend=backend, table={**own, "prefix_cache_bytes": 0, **table})


def start() -> Program:
    return Program(llama_command("LlamaCppCpu"))


def estimated(program: Program, command: Load) -> Estimated:
    program.send(Estimate(load=command))
    program.until(lambda: program.estimated is not None)
    assert program.estimated is not None
    return program.estimated


def with_settings(command: Load, option: LoadOption) -> Load:
    return command.model_copy(update={"table": {**command.table, **option.settings}})


def generated(program: Program) -> list[list[int]]:
    """Greedy and sampled text, and a prompt that fills a slot."""
    requests = [ask(f"{at}", "once upon a time" * at, temperature=at % 2, seed=at) for at in range(1, 4)]
    full = ask("full", [at % 200 + 1 for at in range(FULL - 2)], max_tokens=2)
    return [each.tokens for each in program.generate(*requests, full)]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What the model generates on the CPU."""
    with start() as program:
        program.load(load(model, "LlamaCppCpu"))
        return generated(program)


PLACES: tuple[tuple[dict[str, Any], dict[str, int], int], ...] = (
    ({"cpu_moe": 0}, {"RPC0": LAYERS + 1}, 0),
    ({"cpu_moe": 2}, {"RPC0": LAYERS + 1}, 2),
    ({"cpu_moe": LAYERS}, {"RPC0": LAYERS + 1}, LAYERS),
    ({"cpu_moe": 99, "n_gpu_layers": 4}, {"RAM": 3, "RPC0": 4}, 3),
    ({"cpu_moe": 4, "devices": ["RPC0", "RPC1"], "tensor_split": [3, 4]}, {"RPC0": 3, "RPC1": 4}, 4),
    ({"cpu_moe": 2, "kv": "pool", "n_ctx": 4 * FULL}, {"RPC0": LAYERS + 1}, 2),
)


@pytest.mark.parametrize(("table", "layers", "experts"), PLACES)
def test_experts_are_in_ram_and_the_rest_on_the_device_with_the_same_results_and_the_estimated_bytes(
    model: Path,
    devices: list[RpcDevice],
    expected: list[list[int]],
    table: dict[str, Any],
    layers: dict[str, int],
    experts: int,
) -> None:
    for each in devices:
        each.wait_until_empty()
    with start() as program:
        plan = estimated(program, load(model, **table)).choices[0]
        ready = program.load(with_settings(load(model, **table), plan))
        assert generated(program) == expected
        program.generate(ask("scored", max_tokens=1).model_copy(update={"prompt_logprobs": 1}))
        program.generate(Embed(id="text", prompt=(5, 6, 7)))
        used = {name: each.used() for name, each in zip(("RPC0", "RPC1"), devices, strict=True)}
    assert plan.layout is not None
    assert (ready.layers, ready.experts_in_ram) == (layers, experts)
    assert (plan.layout.layers, plan.layout.experts_in_ram) == (layers, experts)
    for name, allocated in used.items():
        planned = plan.devices.get(name, DEVICE_CONTEXT) - DEVICE_CONTEXT
        assert planned == pytest.approx(allocated, rel=TOLERANCE, abs=MIB), (name, plan.parts)


def test_each_layer_whose_experts_stay_in_ram_takes_their_bytes_off_the_device(
    model: Path, devices: list[RpcDevice]
) -> None:
    taken = list[int]()
    for count in range(LAYERS + 1):
        devices[0].wait_until_empty()
        with start() as program:
            program.load(load(model, devices=["RPC0"], cpu_moe=count))
            taken.append(devices[0].used())
    saved = [before - after for before, after in pairwise(taken)]
    # One layer or another changes the buffers for computing, too.
    assert saved == pytest.approx([OF_A_LAYER] * LAYERS, abs=OF_A_LAYER / 3)


def test_as_few_experts_as_necessary_leave_the_device_and_whole_layers_only_after_them(model: Path) -> None:
    command = load(model, n_ctx="auto")
    with Program(llama_command("LlamaCppCuda", GIB)) as program:
        choices = estimated(program, command).choices
    whole, *less = [each for each in choices if each.settings["n_ctx"] == SHAPE.context_length]
    counts = [(each.settings["cpu_moe"], each.settings["n_gpu_layers"]) for each in (whole, *less)]
    assert counts[: LAYERS + 1] == [(count, LAYERS + 1) for count in range(LAYERS + 1)]
    assert counts[LAYERS + 1 :] == [(LAYERS, count) for count in range(LAYERS, -1, -1)]
    sizes = [each.devices["RPC0"] for each in (whole, *less)[: LAYERS + 1]]
    assert [before - after for before, after in pairwise(sizes[1:])] == [OF_A_LAYER] * (LAYERS - 1)


def test_a_device_that_holds_a_part_of_the_experts_gets_that_part(model: Path) -> None:
    """By hand, without a server: the runner chooses by the memory that it finds."""
    command = load(model, n_ctx="auto")
    with Program(llama_command("LlamaCppCuda", GIB)) as program:
        wished = next(
            each
            for each in estimated(program, command).choices
            if each.settings["cpu_moe"] == 4 and each.settings["n_ctx"] == SHAPE.context_length
        )
    memory = wished.devices["RPC0"] + MIB
    with Program(llama_command("LlamaCppCuda", memory)) as program:
        ready = program.load(command)
        assert (ready.context_length, ready.layers, ready.experts_in_ram) == (4096, {"RPC0": LAYERS + 1}, 4)
        assert program.generate(ask("a", max_tokens=4))[0].tokens


def test_a_card_that_keeps_experts_of_a_dense_model_in_ram_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "dense.gguf", Shape())
    for command in (load(tmp_path / "dense.gguf", cpu_moe=1), Estimate(load=load(tmp_path / "dense.gguf", cpu_moe=1))):
        with Program(llama_command("LlamaCppCuda")) as program:
            program.send(command)
            program.until(lambda program=program: program.failure is not None)
            assert program.failure is not None
            assert program.failure.code == "model_misconfigured"
            assert "cpu_moe: is 1, but the model has no experts" in program.failure.message
