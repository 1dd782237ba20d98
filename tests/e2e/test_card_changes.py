"""Model cards that are edited, and models whose files are replaced, while they are loaded, starting or failing."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from pydantic import JsonValue

from tests.support.fake_model import expected_text
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card

LONG: dict[str, JsonValue] = {"step_seconds": 0.01, "n_ctx": 100_000}


def card(home: Path, name: str, *aliases: str, **table: JsonValue) -> None:
    write_card(home, name, {"cuda": table}, backends=["LlamaCppCpu"], aliases=[name, *aliases])


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(server: ServeProgram) -> list[dict[str, JsonValue]]:
    return server.client.get("/v1/instances").json()["data"]


def row(server: ServeProgram, name: str) -> dict[str, JsonValue]:
    (found,) = [each for each in rows(server) if each["model"] == f"test/{name}"]
    return found


def pid_of(server: ServeProgram, name: str) -> int:
    pid = row(server, name)["pid"]
    assert isinstance(pid, int)
    return pid


def disturbed(server: ServeProgram, name: str, disturb: Callable[[], None], max_tokens: int = 200) -> tuple[str, str]:
    """A stream that ``disturb`` is called in: its text, and the code of the error that ended it, or nothing."""
    body = {"model": name, "prompt": "once", "stream": True, "temperature": 0, "max_tokens": max_tokens}
    text, error = "", ""
    with server.client.stream("POST", "/v1/completions", json=body) as events:
        for line in events.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                error = event["error"]["code"]
                continue
            if not text:
                disturb()
            text += event["choices"][0]["text"]
    return text, error


def test_a_stream_does_not_go_on_with_another_card_than_it_began_with(tmp_path: Path) -> None:
    card(tmp_path, "one", **LONG)
    with ServeProgram(tmp_path, fake=True) as server:

        def disturb() -> None:
            card(tmp_path, "one", slots=2, **LONG)
            until(lambda: row(server, "one")["outdated"])
            os.kill(pid_of(server, "one"), signal.SIGKILL)

        text, error = disturbed(server, "one", disturb, max_tokens=5000)
        assert text
        assert error == "model_changed"
        assert server.complete("one", max_tokens=4).status_code == 200
        assert (row(server, "one")["slots"], row(server, "one")["outdated"]) == (2, False)


def test_a_stream_goes_on_with_its_own_model_when_its_alias_has_moved(tmp_path: Path) -> None:
    card(tmp_path, "one", "chat", **LONG)
    card(tmp_path, "two", eos_after=0)
    with ServeProgram(tmp_path, fake=True) as server:

        def disturb() -> None:
            card(tmp_path, "one", **LONG)
            card(tmp_path, "two", "chat", eos_after=0)
            until(lambda: server.client.get("/v1/route", params={"model": "chat"}).json().get("model") == "test/two")
            os.kill(pid_of(server, "one"), signal.SIGKILL)

        text, error = disturbed(server, "chat", disturb)
        assert error == ""
        assert text == expected_text("once", 200)


def test_a_stream_does_not_go_on_with_a_file_that_was_replaced(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("first")
    card(tmp_path, "one", template_file=str(template), **LONG)
    with ServeProgram(tmp_path, fake=True) as server:

        def disturb() -> None:
            template.write_text("second")
            os.kill(pid_of(server, "one"), signal.SIGKILL)

        text, error = disturbed(server, "one", disturb, max_tokens=5000)
        assert text
        assert error == "model_changed"


def test_a_running_instance_with_an_older_card_says_so_and_is_replaced_by_the_next_request(tmp_path: Path) -> None:
    card(tmp_path, "one", slots=3, **LONG)
    with ServeProgram(tmp_path, fake=True) as server:

        def edit_and_ask() -> None:
            assert (row(server, "one")["slots"], row(server, "one")["outdated"]) == (3, False)
            card(tmp_path, "one", slots=2, **LONG)
            until(lambda: row(server, "one")["outdated"])
            assert server.complete("one", max_tokens=4).status_code == 200
            assert sorted((each["slots"], each["outdated"]) for each in rows(server)) == [(2, False), (3, True)]

        text, error = disturbed(server, "one", edit_and_ask, max_tokens=400)
        assert (text, error) == (expected_text("once", 400), "")
        until(lambda: len(rows(server)) == 1)
        assert row(server, "one")["slots"] == 2


def test_a_card_that_is_corrected_after_its_runner_has_failed_starts_at_once(tmp_path: Path) -> None:
    card(tmp_path, "one", fail_load="it is broken")
    with ServeProgram(tmp_path, fake=True) as server:
        # The pause doubles with each failure, so that in the end even a slow machine sees it.
        until(lambda: server.complete("one", max_tokens=4).status_code == 503 and row(server, "one")["retry_seconds"])
        card(tmp_path, "one")
        until(lambda: row(server, "one")["outdated"])
        assert server.complete("one", max_tokens=4).status_code == 200
        assert [each["last_failure"] for each in rows(server)] == [None]


def test_a_model_whose_card_is_gone_is_unloaded_by_its_id(tmp_path: Path) -> None:
    card(tmp_path, "one")
    with ServeProgram(tmp_path, fake=True) as server:
        assert server.complete("one", max_tokens=4).status_code == 200
        (tmp_path / "custom_model_cards" / "one.toml").unlink()
        until(lambda: row(server, "one")["outdated"])
        assert unload(server, "test/none").status_code == 404
        reply = unload(server, "test/one")
        assert (reply.status_code, reply.json()) == (200, {"model": "test/one", "unloaded": True})
        assert rows(server) == []
        assert unload(server, "test/one").status_code == 404


def unload(server: ServeProgram, model: str) -> httpx.Response:
    return server.client.post("/v1/models/unload", json={"model": model})
