"""Pulling through the server: its route, and requests for models that are not on disk."""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest

from exo.cards.card import ModelCard
from exo.config import HubAccess, Settings
from exo.serving.errors import ServingError
from exo.serving.pull_jobs import Pulled, Pulls, pull_note
from exo.store.errors import PullError
from exo.store.progress import DownloadProgress
from tests.support.hub import REPO, Fault, LocalHub
from tests.support.pulling import gguf_card
from tests.support.server import ServeProgram, write_card
from tests.support.tiny import Shape, write_gguf

BIG = ("streamed", "shared", "spoiled", "partial", "other")
"""Models of 1 MiB that no runner could load."""
TINY = "tiny-Q4_K_M.gguf"
CONTENT = random.Random(5).randbytes(1 << 20)
Event = dict[str, Any]


@pytest.fixture(scope="module")
def one_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    tiny = tmp_path_factory.mktemp("hub") / TINY
    write_gguf(tiny, Shape())
    with LocalHub() as hub:
        hub.commit({**dict.fromkeys(map(file_of, BIG), CONTENT), TINY: tiny})
        yield hub


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory, one_hub: LocalHub) -> Iterator[ServeProgram]:
    home = tmp_path_factory.mktemp("home")
    write_cards(home)
    with ServeProgram(home, HF_ENDPOINT=one_hub.url) as server:
        yield server


@pytest.fixture
def hub(one_hub: LocalHub) -> Iterator[LocalHub]:
    """Without what earlier tests have left."""
    state = one_hub.state
    state.faults, state.asked = [], []
    state.stalled.clear()
    state.go_on.clear()
    yield one_hub
    state.go_on.set()


@pytest.fixture
def server(one_server: ServeProgram, hub: LocalHub) -> ServeProgram:
    """Each model is pulled by one test alone. ``hub`` is its hub."""
    return one_server


def file_of(model: str) -> str:
    return f"{model}-Q8_0.gguf"


def write_cards(home: Path) -> None:
    for model in BIG:
        write_card(home, model, {"cuda": {"repo": REPO, "file": file_of(model)}})
    write_card(home, "tiny", {"cuda": {"repo": REPO, "file": TINY, "n_ctx": 512, "threads": 1}})
    write_card(home, "own", {"cuda": {"path": str(home / "own.gguf")}})
    write_card(home, "nowhere", {"cuda": {"repo": "org/nothing", "file": "*.gguf"}})


def events(reply: httpx.Response) -> Iterator[Event]:
    """Those of a stream, without its end."""
    for line in reply.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def pull(server: ServeProgram, model: str, **fields: object) -> httpx.Response:
    return server.client.post("/v1/models/pull", json={"model": model, "stream": False, **fields})


def models(server: ServeProgram) -> Path:
    return server.log.parent / "models" / REPO.replace("/", "--")


def test_a_stream_tells_how_far_it_is_and_the_whole_reply_is_its_last_event(
    server: ServeProgram, hub: LocalHub
) -> None:
    with server.client.stream("POST", "/v1/models/pull", json={"model": "streamed@cuda"}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        text = reply.read().decode()
    *progress, done = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert text.endswith("data: [DONE]\n\n")
    assert progress[-1]["done"] == progress[-1]["total"] == len(CONTENT)
    assert {each["step"] for each in progress} <= {"waiting", "checking", "downloading"}
    path = models(server) / file_of("streamed")
    assert path.read_bytes() == CONTENT
    assert done == {
        "step": "done",
        "model": "test/streamed",
        "runner": "cuda",
        "quant": "Q8_0",
        "revision": hub.state.newest[REPO],
        "bytes": len(CONTENT),
        "path": str(path),
    }
    assert pull(server, "streamed").json() == done
    assert hub.starts == [0]


def test_two_clients_share_one_download_which_outlives_the_first_of_them_that_leaves(
    server: ServeProgram, hub: LocalHub
) -> None:
    hub.state.faults.append(Fault("stall", at=300_000))
    stay, leave = (server.client.stream("POST", "/v1/models/pull", json={"model": "shared"}) for _ in range(2))
    with stay as staying:
        seen = events(staying)
        assert next(seen)["total"] == len(CONTENT)
        with leave as leaving:
            assert next(events(leaving))["total"] == len(CONTENT)
        assert hub.state.stalled.wait(60)
        hub.state.go_on.set()
        *_, last = seen
    assert last["step"] == "done"
    assert hub.starts == [0]


async def pull_all(pulls: Pulls, card: ModelCard, on_progress: Callable[[], None] = lambda: None) -> Pulled:
    """Downloads the files of a card to the end."""
    async with aclosing(pulls.pull(card, "cuda", None)) as steps:
        async for step in steps:
            if isinstance(step, Pulled):
                return step
            on_progress()
    raise AssertionError("the download has no result")


@pytest.fixture
def settings(tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("EXO_HOME", str(tmp_path / "home"))
    return replace(Settings.load(), hub=HubAccess(hub.url))


async def test_a_pull_stops_when_the_last_who_waits_leaves_and_the_next_goes_on_from_there(
    settings: Settings, hub: LocalHub
) -> None:
    hub.state.faults.append(Fault("stall", at=300_000))
    card = gguf_card(file_of("other"))

    async with Pulls(settings) as pulls:
        async with anyio.create_task_group() as leaving:
            for _ in range(3):
                leaving.start_soon(pull_all, pulls, card)
            await anyio.to_thread.run_sync(hub.state.stalled.wait, 30)
            leaving.cancel_scope.cancel()
        # By now the first download has been told to stop. It sees so as soon as anything comes.
        pulled = await pull_all(pulls, card, on_progress=hub.state.go_on.set)
    assert pulled.found.path is not None
    assert pulled.found.path.read_bytes() == CONTENT
    first, second = hub.starts
    assert first == 0
    assert 0 < second < len(CONTENT)


async def test_whoever_waits_hears_that_the_server_stops(settings: Settings, hub: LocalHub) -> None:
    hub.state.faults.append(Fault("stall", at=300_000))
    caught: list[ServingError] = []

    async def wait(pulls: Pulls) -> None:
        try:
            await pull_all(pulls, gguf_card(file_of("other")))
        except ServingError as error:
            caught.append(error)

    async with anyio.create_task_group() as waiting:
        async with Pulls(settings) as pulls:
            waiting.start_soon(wait, pulls)
            await anyio.to_thread.run_sync(hub.state.stalled.wait, 30)
        hub.state.go_on.set()
    assert [error.code for error in caught] == ["shutdown"]


async def test_a_failure_is_told_to_all_who_wait_and_the_next_request_tries_again(
    settings: Settings, hub: LocalHub
) -> None:
    caught: list[PullError] = []

    async def wait(pulls: Pulls) -> None:
        try:
            await pull_all(pulls, gguf_card("*"))
        except PullError as error:
            caught.append(error)

    async with Pulls(settings) as pulls:
        async with anyio.create_task_group() as waiting:
            for _ in range(2):
                waiting.start_soon(wait, pulls)
        assert [error.code for error in caught] == ["no_match", "no_match"]
        assert caught[0] is not caught[1]
        assert (await pull_all(pulls, gguf_card(file_of("other")))).found.state == "present"


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "says"),
    [
        ({"model": "othr"}, 404, "model_not_found", "model", "did you mean other"),
        ({"model": "other@quantum"}, 400, "runner_not_found", "model", "known are cuda, mlx"),
        ({"model": "other@cuda", "runner": "mlx"}, 400, "invalid_value", "runner", "model asks for cuda (got 'mlx')"),
        ({"model": "other", "runner": "mlx"}, 400, "runner_unavailable", "model", "lists only LlamaCpp"),
        ({"model": "other", "quant": "Q2_K"}, 400, "no_match", "quant", "it has Q8_0, Q4_K_M"),
        ({"model": "own"}, 400, "not_pullable", "model", "names the path"),
        ({"model": "nowhere"}, 404, "not_found", None, "shows no repository org/nothing"),
        (
            {"model": "other", "quantization": "Q8_0"},
            400,
            "unknown_parameter",
            "quantization",
            "there is no such field",
        ),
        ({}, 400, "missing_parameter", "model", "required"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_pulled_is_refused_before_a_stream_begins(
    server: ServeProgram, stream: bool, body: Event, status: int, code: str, param: str | None, says: str
) -> None:
    reply = server.client.post("/v1/models/pull", json={**body, "stream": stream})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)
    assert says in error["message"]


def test_a_failure_on_the_way_is_the_streams_last_event(server: ServeProgram, hub: LocalHub) -> None:
    hub.state.faults.append(Fault("stall", at=300_000))
    with server.client.stream("POST", "/v1/models/pull", json={"model": "spoiled"}) as reply:
        seen = events(reply)
        next(event for event in seen if event["done"])
        shutil.rmtree(models(server))
        hub.state.go_on.set()
        *_, last = seen
    assert reply.status_code == 200
    assert last["error"]["code"] == "store"
    assert str(models(server)) in last["error"]["message"]
    assert pull(server, "spoiled").status_code == 200


def test_offline_it_says_which_setting_forbids_it(tmp_path: Path) -> None:
    write_cards(tmp_path)
    with ServeProgram(tmp_path, EXO_OFFLINE="1") as server:
        reply = pull(server, "other")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "offline")
    assert "unset EXO_OFFLINE" in reply.json()["error"]["message"]


def test_a_request_for_a_model_that_is_not_on_disk_says_what_fetches_it(server: ServeProgram, hub: LocalHub) -> None:
    for stream in (False, True):
        reply = server.complete("tiny", stream=stream)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_downloaded", "model")
        assert "`exo pull test/tiny --runner cuda` fetches it" in error["message"]
    assert server.client.get("/v1/instances").json()["data"] == []
    assert hub.state.asked == []
    # What names its own path is the runner's to refuse.
    assert server.complete("own").json()["error"]["code"] == "model_not_found"
    assert pull(server, "tiny").status_code == 200
    served = server.complete("tiny", max_tokens=1)
    assert served.status_code == 200, served.text


def test_with_auto_pull_requests_wait_for_one_pull_and_hear_of_it(tmp_path: Path, hub: LocalHub) -> None:
    home = tmp_path / "home"
    write_cards(home)
    hub.state.faults.append(Fault("stall", at=1000))
    with (
        ServeProgram(home, "--auto-pull", HF_ENDPOINT=hub.url) as server,
        ThreadPoolExecutor(9) as pool,
        server.client.stream(
            "POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": True}
        ) as reply,
    ):
        whole = [pool.submit(server.complete, "tiny", max_tokens=2) for _ in range(8)]
        lines = (line for line in reply.iter_lines() if line)
        assert next(lines).startswith(": pulling ")
        assert hub.state.stalled.wait(60)
        hub.state.go_on.set()
        rest = list(lines)
        assert [each.result().status_code for each in whole] == [200] * 8
        assert len(server.runners()) == 1
    assert any(line.startswith("data: {") for line in rest)
    assert rest[-1] == "data: [DONE]"
    assert hub.starts == [0]


def test_what_auto_pull_cannot_fetch_is_told_in_the_requests_own_envelope(tmp_path: Path, hub: LocalHub) -> None:
    write_cards(tmp_path)
    with ServeProgram(tmp_path, EXO_AUTO_PULL="true", HF_ENDPOINT=hub.url) as server:
        reply = server.complete("nowhere")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        body = {"model": "nowhere", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        error = server.client.post("/v1/messages", json=body).json()["error"]
        assert error["type"] == "not_found_error"
        assert "org/nothing" in error["message"]


def test_a_model_in_part_is_told_so(server: ServeProgram, hub: LocalHub) -> None:
    hub.state.faults.append(Fault("stall", at=300_000))
    with server.client.stream("POST", "/v1/models/pull", json={"model": "partial"}) as reply:
        next(event for event in events(reply) if event["done"])
        message = server.complete("partial").json()["error"]["message"]
    assert f"of {len(CONTENT):,} bytes are)" in message


def test_a_stop_does_not_wait_for_a_pull_longer_than_for_other_requests(tmp_path: Path, hub: LocalHub) -> None:
    home = tmp_path / "home"
    write_cards(home)
    hub.state.faults.append(Fault("stall", at=300_000))
    with (
        ServeProgram(home, "--drain-timeout", "0", HF_ENDPOINT=hub.url) as server,
        server.client.stream("POST", "/v1/models/pull", json={"model": "other"}) as reply,
    ):
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        server.process.terminate()
        *_, last = lines
        threading.Timer(1, hub.state.go_on.set).start()
        assert server.process.wait(60) == 0
    assert json.loads(last[6:])["error"]["code"] == "shutdown"


@pytest.mark.parametrize(
    ("progress", "says"),
    [
        (DownloadProgress("downloading", "f", 1, 2, 415, 1000, 12.3e6, 4.0), "pulling 41% 12 MB/s"),
        (DownloadProgress("checking", "f", 1, 2, 0, 1000, 0.0, None), "pulling 0%, checking"),
        (
            DownloadProgress("waiting", "", 0, 0, 0, 0, 0.0, None, "another process is pulling it"),
            "pulling 100%, waiting; another",
        ),
    ],
)
def test_a_waiting_request_hears_it_in_a_few_words(progress: DownloadProgress, says: str) -> None:
    assert pull_note(progress).startswith(says)
