"""Two models that do not fit beside each other, and clients that want both: real servers with the fake runner."""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
from pydantic import JsonValue

from tests.e2e.test_card_changes import card, disturbed, pid_of, rows, until
from tests.support.fake_model import expected_text
from tests.support.server import ServeProgram

LIMIT = {"EXO_MEMORY_LIMIT": "300MB"}
"""Room for one of the models."""
LARGE: dict[str, JsonValue] = {"memory": 150_000_000, "n_ctx": 100_000}


def large(home: Path, *names: str, **table: JsonValue) -> None:
    for name in names:
        card(home, name, **LARGE, **table)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def models(server: ServeProgram) -> list[JsonValue]:
    return [each["model"] for each in rows(server)]


def test_a_long_request_makes_room_after_the_limit_and_goes_on_later(tmp_path: Path) -> None:
    large(tmp_path, "long", step_seconds=0.02)
    large(tmp_path, "other")
    with ServeProgram(tmp_path, fake=True, **LIMIT, EXO_EVICT_TIMEOUT="1") as server:
        replies: list[httpx.Response] = []

        def want_the_other() -> None:
            threads.append(in_background(lambda: replies.append(server.complete("other", max_tokens=4))))

        threads: list[threading.Thread] = []
        text, error = disturbed(server, "long", want_the_other, max_tokens=300)
        threads[0].join()
        assert replies[0].status_code == 200
        assert error == ""
        (row,) = [each for each in rows(server) if each["model"] == "test/long"]
        assert (row["instance"], row["deaths"]) != ("test--long@cuda-1", 0)
        assert row["deaths"] == 0
        assert text == expected_text("once", 300)


def test_a_model_stays_when_the_one_who_wanted_its_memory_has_left(tmp_path: Path) -> None:
    large(tmp_path, "hot", step_seconds=0.02)
    large(tmp_path, "other")
    with ServeProgram(tmp_path, fake=True, **LIMIT) as server:
        hot = server.complete("hot", max_tokens=1)
        assert hot.status_code == 200
        pid = pid_of(server, "hot")
        threads: list[threading.Thread] = []
        replies: list[httpx.Response] = []

        def want_the_other_and_leave() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                body = {"model": "other", "prompt": "once", "stream": True, "max_tokens": 4}
                with client.stream("POST", "/v1/completions", json=body) as events:
                    for _ in events.iter_lines():
                        if "test/other" in models(server):
                            break
                    # One who comes for the hot model now has to wait until it is known that it stays.
                    ask = partial(server.complete, "hot", max_tokens=20, temperature=0)
                    threads.append(in_background(lambda: replies.append(ask())))
                    time.sleep(1)

        text, error = disturbed(server, "hot", want_the_other_and_leave, max_tokens=300)
        threads[0].join()
        assert (text, error) == (expected_text("once", 300), "")
        assert replies[0].json()["choices"][0]["text"] == expected_text("once upon a time", 20)
        assert pid_of(server, "hot") == pid
        until(lambda: models(server) == ["test/hot"])


def test_two_clients_that_alternate_between_models_reload_once_in_a_residence_time(tmp_path: Path) -> None:
    """A model is known to alternate when it is loaded again, so the first two loads and the last one may be shorter."""
    residence = 2
    large(tmp_path, "a", "b")
    with ServeProgram(tmp_path, fake=True, **LIMIT, EXO_MIN_RESIDENCE=str(residence)) as server:
        runners: set[JsonValue] = set()
        begin = time.monotonic()

        def ask(name: str) -> None:
            while len(runners) < 6:
                assert server.complete(name, max_tokens=2).status_code == 200
                runners.update(each["pid"] for each in rows(server) if each["model"] == f"test/{name}")

        for thread in [in_background(lambda name=name: ask(name)) for name in "ab"]:
            thread.join()
        assert time.monotonic() - begin > (len(runners) - 3) * residence
