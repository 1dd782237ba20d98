"""Two engines that have loaded one model: lone requests and crowds go where each was measured faster."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from exo.cards.card import ModelCard
from exo.worker.protocol.runners import Prefer
from tests.conftest import fake_card
from tests.server.test_failover import AS_MLX
from tests.support.api_server import serve
from tests.support.fake_model import expected_text
from tests.support.fake_runner import COMMAND
from tests.support.server import ServeProgram, environment, write_card
from tests.support.twins import BACKENDS, write_twins

CROWD = 8
TOKENS = 20
BODY = {"model": "fake/model", "prompt": "hi", "max_tokens": TOKENS, "temperature": 0}
BOTH = ("fake/model@cuda", "fake/model@mlx")


def two_paces(prefer: Prefer | None) -> ModelCard:
    """Runner cuda makes a token in 2 ms and has one slot; mlx takes three times as long for 16 at once."""
    engines = {"cuda": {"slots": 1, "step_seconds": 0.002}, "mlx": {"slots": 16, "step_seconds": 0.006}}
    update = {"backends": ("LlamaCppCpu", "MlxCpu"), "engines": engines, "prefer": prefer}
    return fake_card().model_copy(update=update)


@contextmanager
def client(directory: Path, card: ModelCard) -> Generator[httpx.Client]:
    """Of a server that keeps its measurements in ``directory`` and has both runners loaded."""
    commands = {"cuda": COMMAND, "mlx": AS_MLX}
    with (
        serve(directory, card, commands=commands, speeds_file=directory / "state" / "speeds.json") as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for model in BOTH:
            assert complete(http, model=model).headers["x-exo-runner"] == model.partition("@")[2]
        yield http


def complete(http: httpx.Client, **body: object) -> httpx.Response:
    reply = http.post("/v1/completions", json={**BODY, **body})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["text"] == expected_text("hi", TOKENS)
    return reply


def crowd(http: httpx.Client, requests: int) -> list[httpx.Response]:
    """Keeps ``CROWD`` requests in flight until there have been so many."""
    with ThreadPoolExecutor(CROWD) as threads:
        sent = [threads.submit(complete, http) for _ in range(requests)]
        return [each.result() for each in sent]


def until_figures_decide(http: httpx.Client, requests: int = 1) -> httpx.Response:
    """Sends requests, each of them with others if there are to be some at once, until what was measured suffices."""
    for _ in range(40):
        for reply in [complete(http)] if requests == 1 else crowd(http, requests):
            if f" of {min(requests, CROWD)} at once, " in reply.headers["x-exo-route"]:
                return reply
    raise AssertionError(http.get("/v1/route", params={"model": "fake/model"}).text)


FIGURES = r"of {load} at once, {first} made \d[\d.]* tokens/s and {second} \d[\d.]*, so {backend} is chosen"


def reason(load: int, first: str, second: str, backend: str) -> str:
    return "prefer throughput: " + FIGURES.format(load=load, first=first, second=second, backend=backend)


def test_lone_requests_and_crowds_go_where_each_was_measured_faster(tmp_path: Path) -> None:
    with client(tmp_path, two_paces("throughput")) as http:
        first = complete(http).headers["x-exo-route"]
        assert first == "prefer throughput: too little is measured of cuda with 1 at once, so LlamaCppCpu is chosen"
        lone = until_figures_decide(http)
        assert lone.headers["x-exo-runner"] == "cuda"
        assert re.fullmatch(reason(1, "cuda", "mlx", "LlamaCppCpu"), lone.headers["x-exo-route"])
        in_crowd = until_figures_decide(http, 4 * CROWD)
        assert in_crowd.headers["x-exo-runner"] == "mlx"
        assert re.fullmatch(reason(CROWD, "mlx", "cuda", "MlxCpu"), in_crowd.headers["x-exo-route"])
        served = Counter(reply.headers["x-exo-runner"] for reply in crowd(http, 6 * CROWD))
        assert served["mlx"] > 4 * CROWD
        assert complete(http).headers["x-exo-runner"] == "cuda"
        assert complete(http, model=BOTH[1]).headers["x-exo-route"].startswith("request asks for runner mlx")

        told = http.get("/v1/route", params={"model": "fake/model"}).json()
        assert told["runner"] == "cuda"
        assert told["reason"].startswith("prefer throughput: of 1 at once, cuda made")
        measured = {(each["runner"], each["load"]): each["total_tokens_per_second"] for each in told["speeds"]}
        assert measured["cuda", 1] > measured["mlx", 1]
        assert measured["mlx", CROWD] > measured["cuda", CROWD]


def test_figures_outlive_the_server_and_hold_for_the_same_engine_table_only(tmp_path: Path) -> None:
    card = two_paces("latency")
    with client(tmp_path, card) as http:
        assert until_figures_decide(http).headers["x-exo-runner"] == "cuda"
    with client(tmp_path, card) as http:
        again = complete(http).headers
        assert again["x-exo-runner"] == "cuda"
        assert again["x-exo-route"].startswith("prefer latency: of 1 at once, 100 tokens took ")
    changed = {"mlx": card.engines["mlx"], "cuda": {**card.engines["cuda"], "n_ctx": 512}}
    with client(tmp_path, card.model_copy(update={"engines": changed})) as http:
        assert "too little is measured of cuda with 1 at once" in complete(http).headers["x-exo-route"]


def test_without_preference_speed_is_measured_and_the_cards_order_decides(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "speeds.json").write_text('{"version": 1, "entr')
    slow_first = two_paces(None).model_copy(update={"backends": ("MlxCpu", "LlamaCppCpu")})
    with client(tmp_path, slow_first) as http:
        for model in (*BOTH, *BOTH):
            complete(http, model=model)
        reply = complete(http)
        assert reply.headers["x-exo-runner"] == "mlx"
        assert reply.headers["x-exo-route"] == "card prefers MlxCpu, which is available"
        told = http.get("/v1/route", params={"model": "fake/model"}).json()
        assert {each["runner"] for each in told["speeds"]} == {"cuda", "mlx"}
    assert json.loads((tmp_path / "state" / "speeds.json").read_text())["version"] == 1


def test_two_engines_of_one_model_are_loaded_and_chosen_between(tmp_path: Path) -> None:
    write_card(tmp_path, "twin", write_twins(tmp_path), backends=BACKENDS)
    load = ("--load", "twin@cuda", "--load", "twin@mlx")
    with ServeProgram(tmp_path, *load, "--prefer", "latency") as server:
        body: dict[str, object] = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
        replies = [server.complete(f"twin@{runner}", **body) for runner in ("cuda", "mlx")]
        # A request whose tokens arrive in one piece, as on a busy machine, is not measured. More trials follow then.
        while len(replies) < 300 and "tokens took" not in replies[-1].headers.get("x-exo-route", ""):
            replies.append(server.complete("twin", **body))
        assert len({reply.json()["choices"][0]["text"] for reply in replies}) == 1
        assert {reply.headers["x-exo-runner"] for reply in replies[2:]} == {"cuda", "mlx"}
        last = replies[-1].headers
        figures = r"prefer latency: of 1 at once, 100 tokens took \S+ s with (\w+) and \S+ s with (\w+)[,;].*"
        match = re.fullmatch(figures, last["x-exo-route"])
        assert match, last["x-exo-route"]
        assert {match[1], match[2]} == {"cuda", "mlx"}
        assert last["x-exo-runner"] == (match[2] if "too close" in last["x-exo-route"] else match[1])
        rows = server.client.get("/v1/instances").json()["data"]
        assert sorted((row["runner"], row["state"]) for row in rows) == [("cuda", "Ready"), ("mlx", "Ready")]
    shown = subprocess.run(
        [sys.executable, "-m", "exo", "route", "twin"],
        env={**environment(tmp_path), "EXO_PREFER": "latency"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "prefer latency has a choice once several runners have loaded the model" in shown
    assert re.search(r"^  cuda, 1 at once: \S+ s to the first token, then \S+ tokens/s each", shown, re.MULTILINE)
    assert re.search(r"^  mlx, 1 at once: ", shown, re.MULTILINE)
