"""``exo serve`` on devices with memory of their own: what goes where, and what happens if it does not fit."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from exo.worker.runner_cuda.loading.gguf_sizes import DEVICE_CONTEXT
from tests.support.rpc_devices import rpc_devices
from tests.support.server import ServeProgram, environment, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.tiny.experts import write_experts

MIB = 1 << 20


def loaded(server: ServeProgram, model: str) -> dict[str, int]:
    """Loads a model; the bytes that the budget counts in each place for it."""
    assert server.complete(model, max_tokens=4).status_code == 200
    return instance(server, model)["plan"]["memory"]


def instance(server: ServeProgram, model: str) -> dict[str, Any]:
    instances = server.client.get("/v1/instances").json()["data"]
    (found,) = [each for each in instances if each["model"] == f"test/{model}"]
    return found


def ps(server: ServeProgram) -> str:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "exo", "ps", "-v", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
    return done.stdout


def shown(home: Path, model: str, **variables: str) -> dict[str, Any]:
    """The plan of ``exo show``."""
    command = [sys.executable, "-m", "exo", "show", model, "--json"]
    own = {**environment(home), **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    (engine,) = [each for each in json.loads(done.stdout)["engines"] if each["runner"] == "cuda"]
    return engine["plan"]


def test_two_models_go_on_two_devices_and_one_that_fits_none_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape())
    table = {"path": str(tmp_path / "tiny.gguf"), "threads": 1, "slots": 2, "n_ctx": 2048}
    for name in ("first", "second"):
        write_card(tmp_path, name, {"cuda": table}, backends=["LlamaCppCuda"])
    whole = {**table, "n_ctx": 1 << 22, "n_gpu_layers": -1}
    write_card(tmp_path, "large", {"cuda": whole}, backends=["LlamaCppCuda"])
    with rpc_devices((6 << 28) - (1 << 20), 6 << 28) as devices, ServeProgram(tmp_path) as server:
        assert loaded(server, "first").keys() == {"memory", "RPC1"}
        assert [each.used() > 0 for each in devices] == [False, True]
        assert loaded(server, "second").keys() == {"memory", "RPC0"}
        assert all(each.used() > 0 for each in devices)
        refused = server.complete("large")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
        assert "bytes of memory on RPC" in refused.json()["error"]["message"]


def test_a_device_with_room_for_one_long_context_gets_a_pool_that_several_requests_share(tmp_path: Path) -> None:
    """The plan holds when the pool is full: the device takes no more than the budget counts."""
    shape = Shape(layers=4, heads=8, kv_heads=8, head_dim=64, context_length=8192)
    write_gguf(tmp_path / "tiny.gguf", shape)
    write_card(
        tmp_path,
        "tiny",
        {"cuda": {"path": str(tmp_path / "tiny.gguf"), "threads": 1, "n_ubatch": 512}},
        backends=["LlamaCppCuda"],
    )
    cache = 8192 * 2 * 2 * 4 * 8 * 64  # tokens, keys and values, bytes, layers, elements
    with rpc_devices((570 << 20) + cache + cache // 2) as (device,), ServeProgram(tmp_path) as server:
        counted = loaded(server, "tiny")["RPC0"]
        (instance,) = server.client.get("/v1/instances").json()["data"]
        plan = instance["plan"]
        assert (plan["kv"], plan["slots"]) == ("pool", 4)
        assert plan["context_length"] == 8192
        assert server.client.get("/props").json()["default_generation_settings"]["n_ctx"] == plan["context_length"]
        (model,) = [each for each in server.client.get("/v1/models").json()["data"] if each["id"] == "test/tiny"]
        assert model["max_model_len"] == plan["context_length"]
        slots = server.client.get("/slots").json()
        assert [each["n_ctx"] for each in slots] == [plan["context_length"]] * 4
        prompt = [97 + at * at % 23 for at in range(plan["context_length"] - 600)]
        with ThreadPoolExecutor() as pool:
            long = pool.submit(server.complete, "tiny", prompt=prompt, max_tokens=64)
            short = [pool.submit(server.complete, "tiny", prompt=f"request {at}", max_tokens=32) for at in range(2)]
            assert [each.result().status_code for each in (long, *short)] == [200] * 3
        assert device.used() <= counted
        refused = server.complete("tiny", prompt=[97] * (plan["context_length"] + 1))
        assert refused.status_code == 400
        assert f"{plan['context_length']}" in refused.json()["error"]["message"]


def test_memory_that_runs_out_costs_context_and_is_told(tmp_path: Path) -> None:
    """The device has less memory than it claims to have."""
    shape = Shape("llama", layers=2, heads=4, kv_heads=4, head_dim=64, context_length=98304)
    write_gguf(tmp_path / "long.gguf", shape)
    of_a_token = 2 * 2 * 4 * shape.kv_width
    table: dict[str, JsonValue] = {
        "path": str(tmp_path / "long.gguf"), "threads": 1, "slots": 1, "n_ubatch": 32, "prefix_cache_bytes": 0,
        "cache_type_k": "f32", "cache_type_v": "f32",
    }  # fmt: skip
    write_card(tmp_path, "long", {"cuda": table}, backends=["LlamaCppCuda"])
    with rpc_devices(shape.context_length * of_a_token, claims=2 << 30), ServeProgram(tmp_path) as server:
        reply = server.complete("long", max_tokens=4)
        assert reply.status_code == 200, reply.text
        assert "memory ran out" in reply.headers["x-exo-warning"]
        found = instance(server, "long")
        assert 32768 < found["context_length"] < shape.context_length
        assert found["context_length"] == found["plan"]["context_length"] == found["plan"]["settings"]["n_ctx"]
        assert found["layers"] == {"RPC0": 3}
        assert (found["deaths"], found["last_failure"]) == (0, None)
        (note,) = found["notes"]
        assert f"loaded with n_ctx = {found['context_length']}, because memory ran out" in note
        assert note in ps(server)
        assert note in server.log.read_text()
        assert "x-exo-warning" not in server.complete("long", max_tokens=4).headers


def test_a_model_is_loaded_against_the_budgets_judgement_if_its_card_or_the_server_says_so(tmp_path: Path) -> None:
    """The estimate counts what CUDA itself takes on a GPU, which these devices do not need."""
    write_gguf(tmp_path / "tiny.gguf", Shape())
    table: dict[str, JsonValue] = {
        "path": str(tmp_path / "tiny.gguf"), "threads": 1, "slots": 2, "n_ctx": 2048, "n_gpu_layers": -1,
    }  # fmt: skip
    write_card(tmp_path, "usual", {"cuda": table}, backends=["LlamaCppCuda"])
    write_card(tmp_path, "forced", {"cuda": table}, backends=["LlamaCppCuda"], force_load=True)
    with rpc_devices(DEVICE_CONTEXT // 2):
        with ServeProgram(tmp_path) as server:
            refused = server.complete("usual")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
            reply = server.complete("forced", max_tokens=4)
            assert reply.status_code == 200, reply.text
            assert "loaded against the memory budget" in reply.headers["x-exo-warning"]
            assert "bytes of memory on RPC0, and at most" in ps(server)
            assert instance(server, "forced")["plan"]["memory"]["RPC0"] > DEVICE_CONTEXT
        assert shown(tmp_path, "usual")["problem"].startswith("test/usual needs")
        (note,) = shown(tmp_path, "forced")["notes"]
        assert note.startswith("loaded against the memory budget: test/forced needs")
        assert shown(tmp_path, "usual", EXO_FORCE_LOAD="1")["problem"] is None
        with ServeProgram(tmp_path, "--force-load") as server:
            reply = server.complete("usual", max_tokens=4)
            assert reply.status_code == 200, reply.text
            assert "loaded against the memory budget" in reply.headers["x-exo-warning"]


def test_a_mixture_of_experts_that_does_not_fit_its_device_keeps_experts_in_ram(tmp_path: Path) -> None:
    shape = Shape("qwen3", layers=6, hidden=256, feed_forward=512)
    write_experts(tmp_path / "experts.gguf", shape, 8)
    table: dict[str, JsonValue] = {"path": str(tmp_path / "experts.gguf"), "threads": 1}
    write_card(tmp_path, "experts", {"cuda": table}, backends=["LlamaCppCuda"])
    with rpc_devices(DEVICE_CONTEXT + 80 * MIB) as (device,), ServeProgram(tmp_path) as server:
        loaded(server, "experts")
        found = instance(server, "experts")
        assert found["layers"] == {"RPC0": 7}
        assert 0 < found["experts_in_ram"] == found["plan"]["experts_in_ram"] < 6
        assert found["context_length"] == shape.context_length
        assert f"layers 7 on RPC0; the experts of {found['experts_in_ram']} of them in RAM" in ps(server)
        assert 0 < device.used() < 80 * MIB


def test_two_devices_that_share_a_mixture_of_experts_are_filled_alike(tmp_path: Path) -> None:
    shape = Shape("qwen3", layers=12, hidden=256, feed_forward=512)
    write_experts(tmp_path / "experts.gguf", shape, 8)
    of_a_layer = 3 * 8 * 4 * shape.hidden * shape.feed_forward
    table: dict[str, JsonValue] = {"path": str(tmp_path / "experts.gguf"), "threads": 1}
    write_card(tmp_path, "experts", {"cuda": table}, backends=["LlamaCppCuda"])
    memory = DEVICE_CONTEXT + 80 * MIB
    with rpc_devices(memory, memory) as devices, ServeProgram(tmp_path) as server:
        loaded(server, "experts")
        found = instance(server, "experts")
        used = [each.used() for each in devices]
        assert found["experts_in_ram"] == found["plan"]["experts_in_ram"]
        assert found["layers"] == found["plan"]["layers"]
        assert sum(found["layers"].values()) == 13
        assert 0 < found["experts_in_ram"] < 6
        assert abs(used[0] - used[1]) < 1.5 * of_a_layer
        assert max(used) < 80 * MIB
