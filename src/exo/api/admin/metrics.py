"""``/metrics``: the server's counters and gauges in Prometheus' format, with vLLM's names where vLLM has the same.

Everything is read at the time of a scrape from the records of requests and from the supervisor.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import final

import psutil
from anyio.to_thread import run_sync
from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from exo.serving.app_state import Services
from exo.serving.request_totals import Histogram, Labels, RequestTotals
from exo.worker.supervisor.history import prefix_hits
from exo.worker.supervisor.instance import InstanceReport
from exo.worker.supervisor.memory.memory import Memory
from exo.worker.supervisor.nvml import GpuGauges, read_gpus

_LABELS = ("model", "runner", "backend")
_RAM = "RAM"
_RUNNING = ("prefill", "decode")


def metric_routes(services: Services) -> APIRouter:
    """The scrape."""
    routes = APIRouter(tags=["server"])

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters, gauges and histograms in Prometheus' text format."""
        host = services.host
        names = [each.id or each.address for each in host.nvidia_devices] if host is not None else []
        gpus = await run_sync(read_gpus, names, abandon_on_cancel=True) if names else []
        registry = CollectorRegistry()
        registry.register(_Scrape(services, gpus))
        # Never OpenMetrics, whatever the client accepts: prometheus_client replaces the colons of names there.
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    return routes


@final
class _Scrape(Collector):
    """The metrics of one scrape."""

    def __init__(self, services: Services, gpus: list[GpuGauges]) -> None:
        self._requests = services.activity.totals.requests
        self._refused = services.activity.totals.refused
        self._instances = services.pool.history.totals
        self._reports = services.pool.reports()
        self._running = [record for record in services.activity.running if record.route is not None]
        for record in self._running:
            record.settle()
        self._gpus = gpus
        links = services.links
        self._hosts = {} if links is None else dict.fromkeys(links.up, True) | dict.fromkeys(links.down, False)

    def describe(self) -> Iterable[Metric]:
        """Nothing has to be known before the scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """See ``Collector``."""
        yield from self._load()
        yield from self._tokens()
        yield from self._times()
        yield from self._failures()
        yield from self._loads()
        yield from self._devices()
        if self._hosts:
            up = GaugeMetricFamily("exo:host_up", "Whether another host can be used, 0 or 1.", labels=("host",))
            for name, found in self._hosts.items():
                up.add_metric((name,), int(found))
            yield up

    def _load(self) -> Iterator[Metric]:
        running, waiting, tokens = Counter[Labels](), Counter[Labels](), Counter[Labels]()
        for record in self._running:
            assert record.route is not None
            labels = record.model, record.route.place, record.route.backend
            if record.phase in _RUNNING:
                running[labels] += record.sequences
                tokens[labels] += record.tokens_in_cache
            else:
                waiting[labels] += record.sequences
        cells = Counter[Labels]()
        for report in self._reports:
            if (model := report.now.capabilities) is not None:
                cells[_labels(report)] += model.context_length * (1 if model.kv == "pool" else model.slots)
        known = dict.fromkeys((*cells, *running, *waiting))
        yield _gauge("num_requests_running", "Sequences in a slot.", {each: running[each] for each in known})
        waits = {each: waiting[each] for each in known}
        yield _gauge("num_requests_waiting", "Sequences that wait for a slot or for their model.", waits)
        used = {each: min(1.0, tokens[each] / size) for each, size in cells.items() if size}
        yield _gauge("kv_cache_usage_perc", "Share of the KV cache that running sequences take, 0 to 1.", used)

    def _tokens(self) -> Iterator[Metric]:
        def counts(name: str, help_text: str, field: str) -> Metric:
            return _counter(name, help_text, {each: getattr(of, field) for each, of in self._requests.items()})

        yield counts("prompt_tokens", "Tokens of prompts.", "prompt_tokens")
        yield counts("generation_tokens", "Tokens of output.", "generation_tokens")
        yield counts("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "queried_tokens")
        yield counts("prefix_cache_hits", "Prompt tokens that were not computed again.", "cached_tokens")
        tiers = CounterMetricFamily(
            "exo:prefix_cache_prompts",
            "Prompts that found a prefix, by the tier that had it.",
            labels=(*_LABELS, "tier"),
        )
        found = {labels: Counter(totals.prefixes) for labels, totals in self._instances.items()}
        for report in self._reports:
            if report.prefixes is not None:
                found.setdefault(_labels(report), Counter()).update(prefix_hits(report.prefixes))
        for labels, hits in found.items():
            for tier, count in hits.items():
                tiers.add_metric((*labels, tier), count)
        yield tiers

    def _times(self) -> Iterator[Metric]:
        def times(name: str, help_text: str, field: str) -> Metric:
            family = HistogramMetricFamily(f"exo:{name}", help_text, labels=_LABELS)
            for labels, totals in self._requests.items():
                histogram: Histogram = getattr(totals, field)
                family.add_metric(labels, _buckets(histogram), histogram.sum)
            return family

        yield times("time_to_first_token_seconds", "From a request's arrival to its first token.", "first_token")
        yield times("inter_token_latency_seconds", "Between two tokens of a request.", "inter_token")
        yield times("e2e_request_latency_seconds", "From a request's arrival to its end.", "whole")
        yield times("request_queue_time_seconds", "For which a request waited for a slot.", "queue")
        yield times("request_prefill_time_seconds", "For which a request's prompt was computed.", "prefill")
        yield times("request_decode_time_seconds", "From a request's first token to its end.", "decode")
        yield _by_value("request_success", "Finished sequences.", "finished_reason", self._counts_of("finish_reasons"))
        yield _by_value("routes", "Choices of a runner, by what decided them.", "reason", self._counts_of("routes"))

    def _counts_of(self, field: str) -> dict[Labels, Counter[str]]:
        return {labels: getattr(totals, field) for labels, totals in self._requests.items()}

    def _failures(self) -> Iterator[Metric]:
        def counts(name: str, help_text: str, of: Mapping[Labels, RequestTotals], field: str) -> Metric:
            return _counter(name, help_text, {each: getattr(totals, field) for each, totals in of.items()})

        yield counts("replays", "Requests that lost their runner and continued.", self._requests, "replays")
        yield counts(
            "replayed_tokens", "Tokens of output that were not lost by that.", self._requests, "replayed_tokens"
        )
        yield counts(
            "failovers", "Requests that continued on another kind of runner, or host.", self._requests, "failovers"
        )
        deaths = {each: totals.deaths for each, totals in self._instances.items()}
        yield _counter("runner_deaths", "Runner processes that failed.", deaths)
        refused = CounterMetricFamily("exo:refused_requests", "Requests that ended with an error.", labels=("code",))
        for code, count in self._refused.items():
            refused.add_metric((code,), count)
        yield refused

    def _loads(self) -> Iterator[Metric]:
        loads = SummaryMetricFamily(
            "exo:model_load_seconds", "From a runner's start until it could serve.", labels=_LABELS
        )
        for labels, totals in self._instances.items():
            loads.add_metric(labels, totals.loads, totals.load_seconds)
        yield loads
        evictions = {each: totals.evictions for each, totals in self._instances.items()}
        yield _counter("evictions", "Models unloaded because another one needed their memory.", evictions)

    def _devices(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily("exo:memory_bytes", "Memory by device and kind.", labels=("device", "kind"))
        reserved = sum((each.reserved for each in self._reports), Memory())
        ram = psutil.virtual_memory()
        sizes = {_RAM: {"reserved": reserved.host, "used": ram.total - ram.available, "free": ram.available}}
        for name, size in reserved.devices.items():
            sizes.setdefault(name, {})["reserved"] = size
        for gpu in self._gpus:
            sizes.setdefault(gpu.name, {"reserved": 0}).update(used=gpu.memory_used, free=gpu.memory_free)
        for device, kinds in sizes.items():
            for kind, size in kinds.items():
                memory.add_metric((device, kind), size)
        yield memory
        yield self._gauge_of_gpus("gpu_utilization_ratio", "Share of time in which a GPU computes.", "utilisation")
        yield self._gauge_of_gpus("gpu_temperature_celsius", "Temperature of a GPU.", "celsius")
        yield self._gauge_of_gpus("gpu_power_watts", "Power that a GPU draws.", "watts")

    def _gauge_of_gpus(self, name: str, help_text: str, field: str) -> Metric:
        family = GaugeMetricFamily(f"exo:{name}", help_text, labels=("device",))
        for gpu in self._gpus:
            if (value := getattr(gpu, field)) is not None:
                family.add_metric((gpu.name,), value)
        return family


def _labels(report: InstanceReport) -> Labels:
    return report.now.model_id, report.now.place, report.backend


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def _gauge(name: str, help_text: str, values: Mapping[Labels, float]) -> Metric:
    family = GaugeMetricFamily(f"exo:{name}", help_text, labels=_LABELS)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _counter(name: str, help_text: str, values: Mapping[Labels, float]) -> Metric:
    family = CounterMetricFamily(f"exo:{name}", help_text, labels=_LABELS)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _by_value(name: str, help_text: str, label: str, counts: Mapping[Labels, Counter[str]]) -> Metric:
    family = CounterMetricFamily(f"exo:{name}", help_text, labels=(*_LABELS, label))
    for labels, values in counts.items():
        for value, count in values.items():
            family.add_metric((*labels, value), count)
    return family
