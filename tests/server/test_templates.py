"""Chats whose templates are slow, beside chats whose templates are not."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from exo.chat import sandbox_pool
from tests.conftest import fake_card
from tests.support.api_server import CHAT_TEMPLATE, serve

SLOW = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
"""Takes longer than it may."""


def chat(url: str, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def test_slow_templates_hold_up_no_other_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [fake_card("fake/slow", chat_template=SLOW), fake_card("fake/quick", chat_template=CHAT_TEMPLATE)]
    monkeypatch.setattr(sandbox_pool, "PROCESSES", 2)
    with serve(tmp_path, *cards) as url, ThreadPoolExecutor() as pool:
        assert chat(url, "fake/quick").status_code == 200
        load = {"model": "fake/slow", "prompt": "x", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=load, timeout=120).status_code == 200
        slow = [pool.submit(chat, url, "fake/slow") for _ in range(sandbox_pool.PROCESSES - 1)]
        assert chat(url, "fake/quick").status_code == 200
        assert not [each for each in slow if each.done()]
        for each in slow:
            assert each.result().json()["error"]["code"] == "template_error"
        monkeypatch.setattr(sandbox_pool, "TURN_SECONDS", 0.5)
        slow = [pool.submit(chat, url, "fake/slow") for _ in range(sandbox_pool.PROCESSES + 1)]
        replies = [each.result() for each in slow]
        assert sorted(reply.status_code for reply in replies) == [400] * sandbox_pool.PROCESSES + [503]
        (busy,) = [reply for reply in replies if reply.status_code == 503]
        assert (busy.json()["error"]["code"], busy.headers["retry-after"]) == ("server_busy", "1")
