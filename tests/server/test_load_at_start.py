"""``exo serve --load`` of models that do something other than generate text, and what else any model can do."""

import time
from pathlib import Path

import httpx
import pytest

from exo.cards.card import Task
from tests.conftest import fake_card
from tests.support.api_server import serve

MODEL = "fake/model"


@pytest.mark.parametrize("task", ["TextEmbedding", "TextRanking"])
def test_a_model_without_generation_becomes_ready(tmp_path: Path, task: Task) -> None:
    card = fake_card(MODEL).model_copy(update={"tasks": (task,)})
    with serve(tmp_path, card, load=[MODEL]) as url, httpx.Client(base_url=url, timeout=60) as http:
        deadline = time.monotonic() + 60
        while (ready := http.get("/ready")).status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ready.status_code == 200, ready.text
        assert http.get("/v1/route", params={"model": MODEL}).status_code == 200
        assert http.post("/tokenize", json={"model": MODEL, "content": "hi"}).status_code == 200
        refused = http.post("/v1/completions", json={"model": MODEL, "prompt": "hi"})
        assert refused.json()["error"]["code"] == "unsupported_task"
