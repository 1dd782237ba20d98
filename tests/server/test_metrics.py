"""``/metrics`` as Prometheus reads it, and the dashboard that shows it."""

import json
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from exo.config import Access, ApiKey
from exo.worker.supervisor.nvml import read_gpus
from tests import ROOT
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.nvml import GIB, FakeDevice, fake_nvml
from tests.support.server import DEADLINE_SECONDS, ServeProgram, write_card

MODEL, SLOW = "fake/model", "fake/slow"
LABELS = {"model": MODEL, "runner": "cuda", "backend": "LlamaCppCpu"}
BODY = {"model": MODEL, "prompt": "hi there", "max_tokens": 4, "temperature": 0}
METRIC = re.compile(r"exo:[a-z0-9_]+")


@pytest.fixture
def http(tmp_path: Path) -> Generator[httpx.Client]:
    slow = fake_card(SLOW, slots=1, step_seconds=0.02, n_ctx=1000)
    with serve(tmp_path, fake_card(MODEL), slow) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
"""What Prometheus sends."""


def samples(http: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    reply = http.get("/metrics", headers={"accept": ACCEPT})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(reply.text)
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def value(http: httpx.Client, name: str, labels: Mapping[str, str] = LABELS) -> float:
    return samples(http).get((f"exo:{name}", frozenset(labels.items())), 0.0)


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_finished_requests_are_counted(http: httpx.Client) -> None:
    for _ in range(3):
        assert http.post("/v1/completions", json=BODY).status_code == 200
    wait_until(lambda: value(http, "e2e_request_latency_seconds_count") == 3)
    found = samples(http)

    def of(name: str, **further: str) -> float:
        return found[f"exo:{name}", frozenset({**LABELS, **further}.items())]

    assert (of("prompt_tokens_total"), of("generation_tokens_total")) == (24, 12)
    assert (of("prefix_cache_queries_total"), of("prefix_cache_hits_total")) == (24, 0)
    assert of("request_success_total", finished_reason="length") == 3
    assert of("routes_total", reason="preferred") == 3
    assert of("inter_token_latency_seconds_count") <= 9  # tokens that come together with the first have no time
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert of(f"{name}_seconds_count") == 3
        assert of(f"{name}_seconds_bucket", le="+Inf") == 3
        assert 0 <= of(f"{name}_seconds_sum") <= of("e2e_request_latency_seconds_sum")
    assert of("model_load_seconds_count") == 1
    assert of("runner_deaths_total") == of("replays_total") == of("failovers_total") == of("evictions_total") == 0
    assert (of("num_requests_running"), of("num_requests_waiting"), of("kv_cache_usage_perc")) == (0, 0, 0)
    ram = {kind: found["exo:memory_bytes", frozenset({("device", "RAM"), ("kind", kind)})] for kind in ("used", "free")}
    assert all(size > 0 for size in ram.values())


def test_requests_that_run_and_wait(http: httpx.Client) -> None:
    labels = {**LABELS, "model": SLOW}
    body = {"model": SLOW, "prompt": "x" * 100, "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 2}
    with http.stream("POST", "/v1/completions", json=body):
        wait_until(lambda: value(http, "generation_tokens_total", labels) > 2)
        assert value(http, "num_requests_running", labels) == 2
        assert 0.1 < value(http, "kv_cache_usage_perc", labels) <= 1
    wait_until(lambda: value(http, "num_requests_running", labels) == 0)


def test_names_that_clients_invent_are_no_labels(http: httpx.Client) -> None:
    for name in ("made-up-model", "fake/model@made-up-runner"):
        assert http.post("/v1/completions", json={**BODY, "model": name}).status_code in (400, 404)
    assert http.get("/made-up-path").status_code == 404
    wait_until(lambda: value(http, "refused_requests_total", {"code": "not_found"}) == 1)
    assert value(http, "refused_requests_total", {"code": "model_not_found"}) == 1
    assert "made-up" not in http.get("/metrics").text


def test_a_key_guards_the_metrics(tmp_path: Path) -> None:
    access = Access(keys=(ApiKey("me", "secret-key"),))
    with serve(tmp_path, fake_card(MODEL), access=access) as url, httpx.Client(base_url=url) as http:
        assert http.get("/metrics").status_code == 401
        reply = http.get("/metrics", headers={"authorization": "Bearer secret-key"})
        assert 'exo:refused_requests_total{code="invalid_api_key"} 1.0' in reply.text


def test_a_runner_killed_in_mid_stream_shows_in_deaths_and_replays(tmp_path: Path) -> None:
    """The first process kills itself with SIGKILL at its sixtieth token; the second one has fewer to compute."""
    write_card(tmp_path, "dying", {"cuda": {"die_after": 60}}, backends=["LlamaCppCpu"])
    labels = {**LABELS, "model": "test/dying"}
    with ServeProgram(tmp_path, fake=True) as program:
        body = {"model": "dying", "prompt": "hi", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
        reply = program.client.post("/v1/completions", json={**body, "stream": True})
        assert reply.text.endswith("data: [DONE]\n\n")
        finished = {**labels, "finished_reason": "length"}
        wait_until(lambda: value(program.client, "request_success_total", finished) == 1)
        assert value(program.client, "runner_deaths_total", labels) == 1
        assert value(program.client, "replays_total", labels) == 1
        assert value(program.client, "replayed_tokens_total", labels) <= 60
        assert value(program.client, "generation_tokens_total", labels) == 100
        assert value(program.client, "model_load_seconds_count", labels) == 2


def test_gauges_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(FakeDevice(0x41, used=3 * GIB))

    def lacks(_: object) -> int:
        raise OSError("not supported")

    def rates(_: object) -> object:
        return SimpleNamespace(gpu=40)

    def celsius(_device: object, _sensor: object) -> int:
        return 61

    nvml.__dict__.update(
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetUtilizationRates=rates,
        nvmlDeviceGetTemperature=celsius,
        nvmlDeviceGetPowerUsage=lacks,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (gpu,) = read_gpus(["CUDA0"])
    assert (gpu.name, gpu.memory_used, gpu.memory_free) == ("CUDA0", 3 * GIB, 77 * GIB)
    assert (gpu.utilisation, gpu.celsius, gpu.watts) == (0.4, 61, None)


def metric_names(http: httpx.Client) -> set[str]:
    return {
        line.split()[2].removesuffix("_total")
        for line in http.get("/metrics").text.splitlines()
        if line.startswith("# TYPE ")
    }


def test_the_dashboard_and_the_page_name_what_there_is(http: httpx.Client) -> None:
    assert http.post("/v1/completions", json=BODY).status_code == 200
    there = metric_names(http)
    dashboard: dict[str, Any] = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for query in queries for name in METRIC.findall(query)}
    assert shown - there == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    told = set(METRIC.findall((ROOT / "docs" / "monitoring.md").read_text()))
    assert told == there | {"exo:host_up"}  # only where there are other hosts
