"""Queues: how many requests a model takes, what those that wait are told, and that every place is given back."""

import json
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo.api.http.errors import error_body
from exo.config import Limits
from exo.serving.admission import Queues
from exo.serving.errors import ServingError
from tests.conftest import fake_card
from tests.support.api_server import serve
from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, write_card

MODEL = "fake/model"
SHORT = {"model": MODEL, "prompt": "hi", "max_tokens": 3}
ENDLESS = {"model": MODEL, "prompt": "hi", "ignore_eos": True}
ONE_SLOT = {"slots": 1, "n_ctx": 1_000_000_000, "step_seconds": 0.001}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams open, and tell their place, without waiting."""
    monkeypatch.setattr("exo.api.http.response.GRACE_SECONDS", 0)
    monkeypatch.setattr("exo.api.http.response.PLACE_SECONDS", 0)


@contextmanager
def server(directory: Path, max_queue: int, **table: object) -> Generator[httpx.Client]:
    cards = [
        fake_card(name).model_copy(update={"engines": {"cuda": {**ONE_SLOT, **table}}})
        for name in (MODEL, "fake/other")
    ]
    with (
        serve(directory, *cards, limits=Limits(max_queue=max_queue)) as url,
        httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as http,
    ):
        yield http


@contextmanager
def stream(http: httpx.Client, body: Mapping[str, object]) -> Generator[Iterator[str]]:
    """The lines of a stream that are not empty."""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        assert reply.status_code == 200
        yield (line for line in reply.iter_lines() if line)


def next_comment(lines: Iterator[str], about: str = "") -> str:
    """The next comment that begins with ``about``, or the one that fills a long silence."""
    return next(line for line in lines if line.startswith((f": {about}", ": keep-alive")))


def post(http: httpx.Client, body: Mapping[str, object]) -> httpx.Response:
    return http.post("/v1/completions", json=body)


def is_refused(reply: httpx.Response) -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["type"]) == (429, "queue_full", "rate_limit_error")
    assert MODEL in error["message"]
    assert reply.headers["retry-after"] == "1"


@contextmanager
def stream_soon(http: httpx.Client) -> Generator[None]:
    """An endless stream that is let in as soon as there is a place again."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        with http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as reply:
            if reply.status_code == 200:
                yield
                return
            assert reply.status_code == 429
    pytest.fail("there is no place")


def test_of_a_flood_as_many_are_served_as_there_are_places(tmp_path: Path, gate: Path) -> None:
    with server(tmp_path, 8, load_gate=str(gate)) as http, ThreadPoolExecutor(200) as pool:
        asked = as_completed([pool.submit(post, http, {**SHORT, "stream": at % 2 == 0}) for at in range(200)])
        for _ in range(200 - 9):
            is_refused(next(asked).result())
        gate.open("wb").close()
        assert [reply.result().status_code for reply in asked] == [200] * 9
        assert post(http, SHORT).status_code == 200


def test_a_full_queue_refuses_and_says_when_to_come_again(tmp_path: Path) -> None:
    with server(tmp_path, 1) as http:
        with stream(http, ENDLESS) as running, stream(http, ENDLESS):
            for streamed in (False, True):
                is_refused(post(http, {**SHORT, "stream": streamed}))
            assert post(http, {**SHORT, "model": "fake/other"}).status_code == 200
            assert post(http, {**SHORT, "model": "fake/none"}).status_code == 404
            next(running)
        with stream_soon(http):
            pass


def test_places_are_counted_in_sequences(tmp_path: Path) -> None:
    with server(tmp_path, 2, slots=2) as http:
        assert post(http, SHORT).status_code == 200
        with stream(http, {**ENDLESS, "n": 3}):
            is_refused(post(http, {**SHORT, "n": 2}))
            with stream(http, ENDLESS):
                is_refused(post(http, SHORT))


def test_a_request_larger_than_the_queue_is_served_alone(tmp_path: Path) -> None:
    with server(tmp_path, 0) as http:
        assert len(post(http, {**SHORT, "prompt": ["a", "b"], "n": 3}).json()["choices"]) == 6
        with stream(http, ENDLESS):
            is_refused(post(http, {**SHORT, "n": 6}))


@pytest.mark.usefixtures("at_once")
def test_a_stream_that_waits_is_told_its_place_as_it_changes(tmp_path: Path) -> None:
    with server(tmp_path, 8) as http, ExitStack() as first, ExitStack() as second:
        assert post(http, SHORT).status_code == 200
        running = first.enter_context(stream(http, ENDLESS))
        next(running)
        second.enter_context(stream(http, ENDLESS))
        with stream(http, SHORT) as lines:
            assert next_comment(lines) == ": queued 2"
            second.close()
            assert next_comment(lines) == ": queued 1"
            first.close()
            rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert not [line for line in rest if line.startswith(":")]


@pytest.mark.usefixtures("at_once")
def test_those_who_wait_for_a_load_have_places_too(tmp_path: Path, gate: Path) -> None:
    with server(tmp_path, 8, load_gate=str(gate)) as http, stream(http, SHORT) as first:
        next(first)
        with stream(http, SHORT) as second:
            assert next_comment(second, "queued") == ": queued 1"
            gate.open("wb").close()
            assert list(first)[-1] == "data: [DONE]"
            assert list(second)[-1] == "data: [DONE]"


@pytest.mark.usefixtures("at_once")
def test_places_are_told_anew_when_the_load_shows_how_many_slots_there_are(tmp_path: Path, gate: Path) -> None:
    with server(tmp_path, 8, load_gate=str(gate), slots=2) as http, ExitStack() as others:
        for _ in range(2):
            others.enter_context(stream(http, ENDLESS))
        with stream(http, ENDLESS) as lines:
            assert next_comment(lines, "queued") == ": queued 2"
            gate.open("wb").close()
            assert next_comment(lines, "queued") == ": queued 1"


def test_leaving_the_queue_gives_the_place_back(tmp_path: Path) -> None:
    with server(tmp_path, 1) as http, stream(http, ENDLESS) as running:
        next(running)
        for _ in range(3):
            with stream_soon(http):
                is_refused(post(http, SHORT))


def test_leaving_the_queue_without_a_stream_does_so_too(tmp_path: Path) -> None:
    with server(tmp_path, 1) as http, stream(http, ENDLESS) as running:
        next(running)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=ENDLESS, timeout=httpx.Timeout(60, read=0.3))
        with stream_soon(http):
            is_refused(post(http, SHORT))


@pytest.mark.usefixtures("at_once")
def test_leaving_during_a_load_gives_the_place_back(tmp_path: Path, gate: Path) -> None:
    with server(tmp_path, 0, load_gate=str(gate)) as http:
        with stream(http, ENDLESS) as lines:
            next(lines)
            is_refused(post(http, SHORT))
        with stream_soon(http):
            pass


def test_a_load_that_fails_gives_every_place_back(tmp_path: Path) -> None:
    with server(tmp_path, 2, fail_load="the weights are torn") as http:
        for _ in range(5):
            reply = post(http, {**SHORT, "n": 3})
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_load_failed")


def test_a_client_that_does_not_read_is_cut_off_and_its_slot_is_free(tmp_path: Path) -> None:
    write_card(tmp_path, "fake", {"cuda": {"slots": 1, "n_ctx": 1_000_000_000}}, backends=["LlamaCppCpu"])
    with ServeProgram(tmp_path, fake=True, EXO_STALL_TIMEOUT="0.2") as program, socket.socket() as connection:
        assert program.complete("fake", max_tokens=1).status_code == 200
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = httpx.URL(program.url)
        connection.connect((url.host, url.port))
        body = json.dumps({"model": "fake", "prompt": "hi", "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert program.complete("fake", max_tokens=1).status_code == 200


# A property of the account itself, with requests that end in every way that there is.

Ending = Literal["finish", "fail", "leave"]


@dataclass(slots=True)
class Client:
    sequences: int
    end: anyio.Event = field(default_factory=anyio.Event)
    fails: bool = False
    connection: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    outcome: str = "waiting"

    async def ask(self, queues: Queues) -> None:
        with self.connection:
            try:
                with queues.place(MODEL, self.sequences):
                    self.outcome = "taken"
                    await self.end.wait()
                    if self.fails:
                        raise RuntimeError
                self.outcome = "finished"
            except ServingError as error:
                self.outcome = str(error_body(error).status)
            except RuntimeError:
                self.outcome = "failed"

    def do(self, ending: Ending) -> None:
        self.fails = ending == "fail"
        self.end.set()
        if ending == "leave":
            self.connection.cancel()


Arrival = st.integers(1, 5)
Departure = st.tuples(st.integers(0, 20), st.sampled_from(["finish", "fail", "leave"]))


@given(
    slots=st.integers(0, 3),
    max_queue=st.integers(0, 6),
    steps=st.lists(st.one_of(Arrival, Departure), max_size=25),
    cut=st.booleans(),
)
def test_no_place_is_ever_leaked(slots: int, max_queue: int, steps: list[int | tuple[int, Ending]], cut: bool) -> None:
    async def run() -> None:
        queues = Queues(max_queue, lambda _: slots)
        here: list[Client] = []
        async with anyio.create_task_group() as tasks:
            for step in steps:
                if isinstance(step, int):
                    held = sum(client.sequences for client in here)
                    client = Client(step)
                    tasks.start_soon(client.ask, queues)
                    await anyio.wait_all_tasks_blocked()
                    fits = not held or held + step <= max(1, slots) + max_queue
                    assert client.outcome == ("taken" if fits else "429")
                    here += [client] if fits else []
                elif here:
                    here.pop(step[0] % len(here)).do(step[1])
                    await anyio.wait_all_tasks_blocked()
                assert queues.held(MODEL) == sum(client.sequences for client in here)
            tasks.start_soon(partial(queues.drain, 0 if cut else 60))
            await anyio.wait_all_tasks_blocked()
            assert queues.closed
            late = Client(1)
            await late.ask(queues)
            assert late.outcome == "503"
            if not cut:
                for client in here:
                    client.do("finish")
        assert queues.held(MODEL) == 0
        assert {client.outcome for client in here} <= {"503" if cut else "finished"}

    anyio.run(run)
