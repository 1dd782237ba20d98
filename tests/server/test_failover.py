"""One model that two engines can serve: when one keeps dying, its requests move to the other."""

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from exo.cards.card import ModelCard
from exo.worker.protocol.probe import Probe
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.fake_model import expected_text
from tests.support.fake_runner import COMMAND

BODY = {"model": "fake/model", "prompt": "hi", "max_tokens": 20, "temperature": 0}

PROBES_AS_MLX = f"""
import sys
if sys.argv[1:] == ["--probe"]:
    print({Probe(installed=True, engine="fake", version="1", backends=("MlxCpu",)).model_dump_json()!r})
else:
    from tests.support import fake_runner
    fake_runner.main()
"""
AS_MLX = (sys.executable, "-c", PROBES_AS_MLX)
"""The fake runner as runner mlx of this host."""


@pytest.fixture
def card() -> ModelCard:
    """On runner cuda every request dies after its fifth token; on mlx none does."""
    update = {"backends": ("LlamaCppCpu", "MlxCpu"), "engines": {"cuda": {"die_at": 5}, "mlx": {}}}
    return fake_card().model_copy(update=update)


@pytest.fixture
def http(tmp_path: Path, card: ModelCard) -> Iterator[httpx.Client]:
    commands = {"cuda": COMMAND, "mlx": AS_MLX}
    with serve(tmp_path, card, commands=commands) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_a_request_moves_to_the_other_engine_and_later_ones_begin_there(http: httpx.Client) -> None:
    first = http.post("/v1/completions", json=BODY)
    assert first.status_code == 200, first.text
    assert first.json()["choices"][0]["text"] == expected_text("hi", 20)
    assert first.json()["usage"]["completion_tokens"] == 20
    later = http.post("/v1/completions", json=BODY)
    assert later.json()["choices"][0]["text"] == expected_text("hi", 20)
    for reply in (first, later):
        assert reply.headers["x-exo-runner"] == "mlx"
        assert "is left out while runner cuda keeps failing" in reply.headers["x-exo-route"]


def test_a_request_that_names_its_runner_is_not_moved(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json={**BODY, "model": "fake/model@cuda"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "runner_died")
    assert int(reply.headers["retry-after"]) >= 1
