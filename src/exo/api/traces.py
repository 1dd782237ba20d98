"""OpenTelemetry spans of requests, made from their records when they are over and exported with OTLP over HTTP.

The SDK is an optional extra, imported only where an endpoint is set.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, final

from starlette.datastructures import Headers

from exo import __version__
from exo.serving.activity import Phase, RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Attribute = str | int | float | Sequence[str]

_EXPORT_SECONDS = 5.0
"""The time that a collector has to take spans, also when the server stops."""
_SPANS: Mapping[Phase, str] = {"queued": "queue", "loading": "load", "prefill": "prefill", "decode": "decode"}
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/completion": "text_completion",
    "/infill": "text_completion",
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
    "/embedding": "embeddings",
}
"""The names of OpenTelemetry's conventions for generative AI. Other paths have their last part for a name."""


class TracesError(Exception):
    """Spans cannot be exported; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a request, for a span of its own. Times are by ``time.monotonic``."""

    name: str
    start: float
    end: float
    attributes: Mapping[str, Attribute]


@final
class Traces:
    """Exports the spans of each request, in a thread of the SDK's."""

    def __init__(self, endpoint: str, service: str, exporter: "SpanExporter | None" = None) -> None:
        """``endpoint`` is the collector's address without a path; ``exporter`` replaces it. Raises TracesError."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise TracesError(f"traces need OpenTelemetry ({error}): pip install 'exo[otel]'") from error
        if exporter is None:
            exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_SECONDS)
        resource = Resource.create({"service.name": service, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("exo", __version__)

    def export(self, record: RequestRecord, headers: Headers) -> None:
        """Makes the spans of a request that is over, below the client's own span if its headers name one.

        Requests that only ask for information have none.
        """
        if record.method != "POST":
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        def nanoseconds(at: float) -> int:
            return int((record.started + at - record.began) * 1e9)

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        operation = _OPERATIONS.get(record.path) or record.path.rpartition("/")[2]
        whole = self._tracer.start_span(
            f"{operation} {record.model}".strip(),
            TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=dict(_attributes(record, operation)),
            start_time=nanoseconds(record.began),
        )
        inside = set_span_in_context(whole)
        for each in stretches(record):
            span = self._tracer.start_span(
                each.name, inside, attributes=dict(each.attributes), start_time=nanoseconds(each.start)
            )
            span.end(nanoseconds(each.end))
        if record.phase == "failed":
            whole.set_status(Status(StatusCode.ERROR, record.error))
        whole.end(nanoseconds(record.marks[-1].at))

    def close(self) -> None:
        """Exports the remaining spans. May take some seconds."""
        self._provider.shutdown()


def stretches(record: RequestRecord) -> Iterator[Stretch]:
    """The parts of a request that is over: its phases, its routes and its replays, each until work goes on."""
    marks, end = record.marks, record.marks[-1].at
    for mark, after in pairwise(marks):
        if (name := _SPANS.get(mark.phase)) is not None:
            yield Stretch(name, mark.at, after.at, {})
    losses = [loss.at for loss in record.losses]
    for at, route in record.routes:
        began = max([record.began, *(loss for loss in losses if loss <= at)])
        yield Stretch("route", began, at, {"exo.runner": route.runner, "exo.route": route.reason})
    for loss in record.losses:
        resumed = (mark.at for mark in marks if mark.at >= loss.at and mark.phase in ("prefill", "decode"))
        lost = {"exo.instance": loss.instance, "exo.replayed_tokens": loss.tokens}
        yield Stretch("replay", loss.at, next(resumed, end), lost)


def _attributes(record: RequestRecord, operation: str) -> Iterator[tuple[str, Attribute]]:
    yield "gen_ai.operation.name", operation
    yield "gen_ai.provider.name", "exo"
    yield "http.request.method", record.method
    yield "url.path", record.path
    yield "exo.request.id", record.id
    if record.status is not None:
        yield "http.response.status_code", record.status
    if record.model:
        yield "gen_ai.request.model", record.model
    if record.sequences > 1:
        yield "gen_ai.request.choice.count", record.sequences
    if record.error:
        yield "error.type", record.error
    if record.route is not None:
        yield "gen_ai.response.model", record.model
        yield "exo.runner", record.route.place
        yield "exo.backend", record.route.backend
        yield "exo.instance", record.instance
        yield "exo.route", record.route.reason
        yield "gen_ai.usage.input_tokens", record.prompt_tokens
        yield "gen_ai.usage.output_tokens", record.completion_tokens
        yield "gen_ai.usage.cache_read.input_tokens", record.cached_tokens
    if record.finish_reasons:
        yield "gen_ai.response.finish_reasons", tuple(record.finish_reasons)
    if record.first_token is not None:
        yield "gen_ai.response.time_to_first_chunk", record.first_token - record.began
