"""The dashboard in ``docs/grafana.json``, asked of a Prometheus that scrapes a server."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from exo.config import Access, ApiKey
from tests import ROOT
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.server import DEADLINE_SECONDS

KEY = "a-secret-key"
BODY = {"model": "fake/model", "prompt": "hi there", "max_tokens": 4, "temperature": 0}
WITHOUT_DATA = ("exo:gpu_", "sum by (tier)")
"""No GPU is here, and no prompt finds a prefix."""
PROMETHEUS = shutil.which("prometheus")


@contextmanager
def scraping(folder: Path, server: str) -> Generator[httpx.Client]:
    """A Prometheus with the settings of docs/monitoring.md, which scrapes more often."""
    assert PROMETHEUS is not None
    target = {"targets": [server.removeprefix("http://")]}
    job = {"job_name": "exo", "static_configs": [target], "authorization": {"credentials": KEY}}
    config = folder / "prometheus.yml"
    settings = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    config.write_text(json.dumps({"global": settings, "scrape_configs": [job]}))  # JSON is YAML
    command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += ["--web.listen-address=127.0.0.1:0"]
    log = folder / "prometheus.log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            until = time.monotonic() + DEADLINE_SECONDS
            while (listening := re.search(r'"Listening on" address=(\S+)', log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            with httpx.Client(base_url=f"http://{listening[1]}", timeout=60) as client:
                yield client
        finally:
            process.terminate()


def ask(prometheus: httpx.Client, query: str) -> list[dict[str, Any]]:
    reply = prometheus.get("/api/v1/query", params={"query": query})
    assert reply.status_code == 200, (query, reply.text)
    return reply.json()["data"]["result"]


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed; Debian's package is called prometheus")
def test_every_panel_shows_what_prometheus_has(tmp_path: Path) -> None:
    dashboard: dict[str, Any] = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    access = Access(keys=(ApiKey("prometheus", KEY),))
    with (
        serve(tmp_path / "server", fake_card("fake/model"), access=access) as url,
        scraping(tmp_path, url) as prometheus,
        httpx.Client(base_url=url, headers={"x-api-key": KEY}, timeout=60) as client,
    ):
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.post("/v1/completions", json={**BODY, "model": "none"}).status_code == 404
        missing = queries
        until = time.monotonic() + DEADLINE_SECONDS
        while any(not query.startswith(WITHOUT_DATA) for query in missing):
            missing = {query for query in missing if not ask(prometheus, query)}
            assert time.monotonic() < until, missing
            time.sleep(0.2)
        (told,) = ask(prometheus, "exo:generation_tokens_total")
        assert told["value"][1] == "4"
        assert set(told["metric"]) >= {"model", "runner", "backend"}
