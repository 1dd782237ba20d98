"""OpenTelemetry spans, as a collector on this machine receives them from ``exo serve``."""

import gzip
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.api_server import CHAT_TEMPLATE
from tests.support.server import ServeProgram, environment, write_card

BODY = {"model": "tiny", "prompt": "my secret question", "max_tokens": 3, "temperature": 0}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                packed = self.headers.get("content-encoding") == "gzip"
                assert self.path == "/v1/traces"
                collector.bodies.append(gzip.decompress(body) if packed else body)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class has this name
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def spans(self) -> list[Any]:
        requests: list[Any] = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        resources = [resource for request in requests for resource in request.resource_spans]
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]

    def trace(self, request: str) -> tuple[Any, list[Any]]:
        """The span of a request that has this id, and those below it."""
        (root,) = (span for span in self.spans() if attributes(span).get("exo.request.id") == request)
        return root, [span for span in self.spans() if span.parent_span_id == root.span_id]


def attributes(span: Any) -> dict[str, Any]:  # noqa: ANN401 -- protobuf's messages have no types
    def value(of: Any) -> Any:  # noqa: ANN401
        kind = of.WhichOneof("value")
        return [value(each) for each in of.array_value.values] if kind == "array_value" else getattr(of, kind)

    return {each.key: value(each.value) for each in span.attributes}


@pytest.fixture
def collector() -> Generator[Collector]:
    taking = Collector()
    thread = threading.Thread(target=taking.server.serve_forever)
    thread.start()
    yield taking
    taking.server.shutdown()
    thread.join()
    taking.server.server_close()


@contextmanager
def serving(home: Path, url: str, **table: int | str) -> Generator[ServeProgram]:
    write_card(home, "tiny", {"cuda": dict(table)}, backends=["LlamaCppCpu"])
    with ServeProgram(home, fake=True, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_BSP_SCHEDULE_DELAY="50") as program:
        yield program


def test_the_spans_of_a_request(collector: Collector, tmp_path: Path) -> None:
    headers = {"x-request-id": "seek-me", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    with serving(tmp_path, collector.url) as server:
        assert server.client.get("/v1/models").status_code == 200
        reply = server.client.post("/v1/completions", json={**BODY, "stream": True}, headers=headers)
        assert reply.status_code == 200
        refused = server.client.post(
            "/v1/completions", json={**BODY, "model": "x"}, headers={"x-request-id": "refused"}
        )
        assert refused.status_code == 404
    root, parts = collector.trace("seek-me")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert root.name == "text_completion test/tiny"
    known = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "exo",
        "gen_ai.request.model": "test/tiny",
        "gen_ai.usage.input_tokens": 18,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
        "http.response.status_code": 200,
        "exo.runner": "cuda",
        "exo.route": reply.headers["x-exo-route"],
    }
    assert {name: attributes(root).get(name) for name in known} == known
    assert {"route", "load", "queue", "prefill", "decode"} <= {span.name for span in parts}
    for span in parts:
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    failed, _ = collector.trace("refused")
    assert (failed.status.code, attributes(failed)["error.type"]) == (2, "model_not_found")
    assert (
        len([span for span in collector.spans() if not span.parent_span_id or span.parent_span_id.hex() == PARENT]) == 2
    )
    assert all(b"secret" not in body for body in collector.bodies)


OPERATIONS = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}, "chat"),
    "/v1/messages": ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}, "chat"),
    "/v1/responses": ({"input": "hi", "max_output_tokens": 1}, "chat"),
    "/api/chat": ({"messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 1}}, "chat"),
    "/api/generate": ({"prompt": "hi", "options": {"num_predict": 1}}, "text_completion"),
    "/completion": ({"prompt": "hi", "n_predict": 1}, "text_completion"),
    "/v1/embeddings": ({"input": "hi"}, "embeddings"),
    "/api/embed": ({"input": "hi"}, "embeddings"),
}
"""Requests of each kind, and what the conventions for generative AI call it."""


def test_each_kind_of_request_has_its_name(collector: Collector, tmp_path: Path) -> None:
    with serving(tmp_path, collector.url, chat_template=CHAT_TEMPLATE) as server:
        for path, (body, _) in OPERATIONS.items():
            reply = server.client.post(path, json={"model": "tiny", **body}, headers={"x-request-id": path[1:]})
            assert reply.status_code == 200, (path, reply.text)
    for path, (_, operation) in OPERATIONS.items():
        root, _ = collector.trace(path[1:])
        assert root.name == f"{operation} test/tiny"
        assert attributes(root)["gen_ai.operation.name"] == operation
        assert attributes(root)["gen_ai.usage.input_tokens"] > 0
        assert not root.parent_span_id


@pytest.mark.parametrize("parent", ["nonsense", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", "x" * 5000])
def test_a_broken_traceparent_costs_nothing(collector: Collector, tmp_path: Path, parent: str) -> None:
    headers = {"x-request-id": "odd", "traceparent": parent}
    with serving(tmp_path, collector.url) as server:
        assert server.client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
    root, _ = collector.trace("odd")
    assert not root.parent_span_id


def test_a_replay_has_a_span(collector: Collector, tmp_path: Path) -> None:
    with serving(tmp_path, collector.url, die_after=60) as server:
        body = {**BODY, "max_tokens": 100, "ignore_eos": True}
        assert server.client.post("/v1/completions", json=body, headers={"x-request-id": "moved"}).status_code == 200
    root, parts = collector.trace("moved")
    (replay,) = (span for span in parts if span.name == "replay")
    assert attributes(replay)["exo.instance"].startswith("test--tiny@cuda-")
    assert attributes(replay)["exo.replayed_tokens"] <= 60
    assert attributes(root)["gen_ai.usage.output_tokens"] == 100
    assert len([span for span in parts if span.name == "route"]) == 2


def test_a_collector_that_is_not_there_harms_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "http://127.0.0.1:9") as server:
        assert server.client.post("/v1/completions", json=BODY).status_code == 200


def test_the_sdk_is_imported_only_where_an_endpoint_is_set(tmp_path: Path) -> None:
    source = """
import sys
from pathlib import Path
from exo.api.server import create_app
from exo.cards.catalogue import Catalogue
from exo.config import Settings
from exo.serving.app_state import Services
import anyio
async def main():
    settings = Settings.load()
    create_app(settings, Services(settings, Catalogue({}, {}, ()), {}))
anyio.run(main)
print(any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules))
"""

    def loaded(**variables: str) -> str:
        env = {**environment(tmp_path), **variables}
        return subprocess.run(
            [sys.executable, "-c", source], env=env, capture_output=True, check=True, text=True
        ).stdout

    assert loaded() == "False\n"
    assert loaded(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9") == "True\n"


def test_an_endpoint_that_is_none(tmp_path: Path) -> None:
    env = {**environment(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": "collector"}
    command = [sys.executable, "-m", "exo", "serve", "--port", "0"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: expected an address" in done.stderr
