"""Upstream exo's routes: its quick start, the questions of its benchmark, and the flag that leaves them out."""

import json
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import JsonValue

from exo.config import Settings
from tests.conftest import fake_card
from tests.server.test_failover import AS_MLX
from tests.support import fake_runner
from tests.support.api_server import CHAT_TEMPLATE, serve
from tests.support.nvml import FakeDevice, fake_nvml

MODEL, BROKEN, BOTH = "fake/model", "fake/broken", "fake/both"
NAME = "fake--model@cuda"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
DEADLINE_SECONDS = 300


@pytest.fixture
def http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[httpx.Client]:
    """A server on a machine without GPUs."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    cards = (
        fake_card(MODEL, chat_template=CHAT_TEMPLATE, n_ctx=256, eos_after=3),
        fake_card(BROKEN, fail_load="no such file"),
        fake_card(BOTH).model_copy(update={"backends": ("MlxCpu", "LlamaCppCpu")}),
    )
    with serve(tmp_path, *cards) as url, httpx.Client(base_url=url, timeout=DEADLINE_SECONDS) as client:
        yield client


def events(http: httpx.Client, **query: str | float) -> list[dict[str, Any]]:
    with http.stream("GET", "/instance/await", params=httpx.QueryParams(query)) as reply:
        return [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_ready(http: httpx.Client, name: str = NAME) -> bool:
    reply = http.get(f"/state/runners/{name}")
    return reply.status_code == 200 and "RunnerReady" in reply.json()


def test_the_quick_start_places_asks_and_deletes(http: httpx.Client) -> None:
    (preview,) = http.get("/instance/previews", params={"model_id": MODEL}).json()["previews"]
    assert (preview["error"], preview["memory_delta_by_node"]) == (None, {http.get("/node_id").json(): 1})
    assert events(http, model_id=MODEL, timeout_seconds=0.01)[0]["type"] == "timeout"

    created = http.post("/instance", json={"instance": preview["instance"]}).json()
    assert (created["message"], created["model_card"]["modelId"]) == ("Command received.", MODEL)
    assert events(http, model_id=MODEL) == [{"type": "ready", "instance": preview["instance"]}]
    until(lambda: is_ready(http))
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert http.get("/state").json()["instances"] == {NAME: preview["instance"]}
    assert http.get(f"/instance/{NAME}").json() == preview["instance"]

    assert http.delete(f"/instance/{NAME}").json()["instance_id"] == NAME
    assert http.get(f"/instance/{NAME}").status_code == http.delete(f"/instance/{NAME}").status_code == 404
    assert http.get(f"/state/instances/{NAME}").status_code == 404


def test_an_instance_is_seen_while_its_model_loads(tmp_path: Path, gate: Path) -> None:
    card = fake_card(MODEL, load_gate=str(gate))
    with serve(tmp_path, card) as url, httpx.Client(base_url=url, timeout=DEADLINE_SECONDS) as http:
        assert http.post("/place_instance", json={"model_id": MODEL}).json()["instance_id"] == NAME
        assert events(http, model_id=MODEL)[0]["type"] == "ready"
        assert not is_ready(http)
        gate.open("wb").close()
        until(lambda: is_ready(http))


def test_a_model_that_does_not_load_says_why_until_it_is_deleted(http: httpx.Client) -> None:
    name = http.post("/place_instance", json={"model_id": BROKEN}).json()["instance_id"]
    until(lambda: "RunnerFailed" in http.get(f"/state/runners/{name}").json())
    assert "no such file" in http.get(f"/state/runners/{name}").json()["RunnerFailed"]["errorMessage"]
    assert events(http, model_id=BROKEN, timeout_seconds=0.01)[0]["type"] == "timeout"
    assert http.delete(f"/instance/{name}").status_code == 200
    assert http.get(f"/instance/{name}").status_code == 404


def test_there_is_a_preview_for_each_runner_with_the_reason_against_it(http: httpx.Client) -> None:
    mlx, cuda = http.get("/instance/previews", params={"model_id": BOTH}).json()["previews"]
    assert mlx["instance"] is None
    assert "not installed" in mlx["error"]
    assert "fake--both@cuda" in cuda["instance"]["MlxRingInstance"]["shardAssignments"]["runnerToShard"]
    (wished,) = http.get("/instance/previews", params={"model_id": f"{BOTH}@cuda"}).json()["previews"]
    assert wished == cuda


@pytest.mark.parametrize("field", [{"min_nodes": 2}, {"sharding": "Tensor"}, {"instance_meta": "MlxJaccl"}])
def test_what_one_node_cannot_do_is_refused_by_name(http: httpx.Client, field: dict[str, JsonValue]) -> None:
    reply = http.post("/place_instance", json={"model_id": MODEL, **field})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(field)))


@pytest.mark.parametrize("instance", [{}, {"MlxRingInstance": {"instanceId": "other"}}, {"MlxRingInstance": 3}])
def test_an_instance_that_no_preview_shows_is_refused(http: httpx.Client, instance: dict[str, JsonValue]) -> None:
    reply = http.post("/instance", json={"instance": instance})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "instance")


def test_a_benchmark_learns_of_models_downloads_and_the_machine(http: httpx.Client) -> None:
    models = {each["hugging_face_id"]: each for each in http.get("/models").json()["data"]}
    assert (models[MODEL]["name"], models[MODEL]["storage_size_megabytes"]) == ("model", 0)
    node = http.get("/state/topology/nodes/0").json()
    done = [each["DownloadCompleted"] for each in http.get(f"/state/downloads/{node}").json()]
    shards = {each["shardMetadata"]["PipelineShardMetadata"]["modelCard"]["modelId"]: each for each in done}
    assert shards.keys() == models.keys()
    shard = shards[MODEL]["shardMetadata"]
    assert http.post("/download/start", json={"targetNodeId": node, "shardMetadata": shard}).status_code == 200
    reply = http.post("/download/start", json={"targetNodeId": node, "shardMetadata": {}})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "shardMetadata")
    for path in (f"nodeMemory/{node}/ramTotal/inBytes", f"nodeDisk/{node}/available/inBytes"):
        assert http.get(f"/state/{path}").json() > 0
    assert http.get(f"/state/nodeIdentities/{node}/friendlyName").json()
    for path in ("nothing", f"nodeMemory/{node}/ramTotal/inBytes/3", "topology/nodes/1", "topology/nodes/-1"):
        assert http.get(f"/state/{path}").status_code == 404


def test_a_benchmarks_reply_goes_on_to_its_limit_and_has_the_speed(http: httpx.Client) -> None:
    reply = http.post("/bench/chat/completions", json={**CHAT, "logprobs": False, "use_prefix_cache": False})
    assert reply.headers.get("x-exo-warning") is None
    whole = reply.json()
    assert (whole["choices"][0]["finish_reason"], whole["power_usage"]) == ("length", None)
    stats = whole["generation_stats"]
    assert (stats["prompt_tokens"], stats["generation_tokens"]) == (whole["usage"]["prompt_tokens"], 8)
    assert stats["prompt_tps"] > 0
    assert stats["generation_tps"] >= 0
    assert stats["peak_memory_usage"]["inBytes"] >= 0
    assert stats["prefix_cache_hit"] == "none"
    *_, told, end = http.post("/bench/chat/completions", json={**CHAT, "stream": True}).text.strip().split("\n\n")
    assert end == "data: [DONE]"
    assert json.loads(told.removeprefix(": generation_stats "))["generation_tokens"] == 8


def test_a_benchmark_measures_the_instance_that_is_placed(tmp_path: Path) -> None:
    """The router would choose llama.cpp, which comes first in the model card."""
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE, n_ctx=256)
    engines = {"cuda": card.engines["cuda"], "mlx": card.engines["cuda"]}
    both = card.model_copy(update={"backends": ("LlamaCppCpu", "MlxCpu"), "engines": engines})
    commands = {"cuda": fake_runner.COMMAND, "mlx": AS_MLX}
    with (
        serve(tmp_path, both, commands=commands) as url,
        httpx.Client(base_url=url, timeout=DEADLINE_SECONDS) as http,
    ):
        _, mlx = http.get("/instance/previews", params={"model_id": MODEL}).json()["previews"]
        assert http.post("/instance", json={"instance": mlx["instance"]}).status_code == 200
        assert http.post("/bench/chat/completions", json=CHAT).headers["x-exo-runner"] == "mlx"


def test_on_a_gpu_a_benchmark_learns_of_its_load_and_of_the_energy_of_a_reply(
    tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[int] = []

    def energy(_: FakeDevice) -> int:
        readings.append(int(time.monotonic() * 100_000))  # 100 W, in millijoules
        return readings[-1]

    def told(answer: object) -> Callable[..., object]:
        return lambda *_: answer

    nvml = fake_nvml(FakeDevice(0x41))
    nvml.__dict__.update(
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetUtilizationRates=told(SimpleNamespace(gpu=40)),
        nvmlDeviceGetTemperature=told(61),
        nvmlDeviceGetPowerUsage=told(100_000),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    card = fake_card(MODEL, chat_template=CHAT_TEMPLATE, load_gate=str(gate))
    with (
        serve(tmp_path, card) as url,
        httpx.Client(base_url=url, timeout=DEADLINE_SECONDS) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        reply = pool.submit(http.post, "/bench/chat/completions", json=CHAT)
        until(lambda: len(readings) > 1)
        gate.open("wb").close()
        power = reply.result().json()["power_usage"]
        assert http.get("/state/nodeSystem/local").json() == {"gpuUsage": 0.4, "temp": 61, "sysPower": 100}
    prefill, generation = power["prefill_energy_joules"], power["generation_energy_joules"]
    assert prefill > 0
    assert generation > 0
    assert power["total_energy_joules"] == prefill + generation
    assert power["total_avg_sys_power_watts"] > 0


def test_a_flag_leaves_the_routes_out(tmp_path: Path) -> None:
    assert not Settings.load(no_upstream_api=True).upstream_api
    with serve(tmp_path, fake_card(MODEL), upstream_api=False) as url, httpx.Client(base_url=url) as http:
        for path in ("/state", "/node_id", "/instance/previews?model_id=x"):
            assert http.get(path).status_code == 404
        assert http.get("/v1/models").status_code == 200
