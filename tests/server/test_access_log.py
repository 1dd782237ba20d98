"""The access log of ``exo serve``: one line for each request, for people or as JSON."""

import json
import re
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.server import DEADLINE_SECONDS, ServeProgram, write_card

BODY = {"model": "tiny", "prompt": "my secret question", "max_tokens": 3, "temperature": 0}
HEADERS = {"user-agent": "agent/1.0", "x-request-id": "seek-me"}


@contextmanager
def serving(home: Path, **variables: str) -> Generator[ServeProgram]:
    write_card(home, "tiny", {"cuda": {}}, backends=["LlamaCppCpu"])
    with ServeProgram(home, fake=True, **variables) as program:
        yield program


def line_with(server: ServeProgram, *words: str) -> str:
    """The only line of the log that has all these words."""
    until = time.monotonic() + DEADLINE_SECONDS
    while True:
        lines = server.log.read_text().splitlines()
        found = [line for line in lines if all(word in line for word in words)]
        if found:
            assert len(found) == 1, found
            return found[0]
        assert time.monotonic() < until, lines
        time.sleep(0.02)


def test_a_line_for_people(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        reply = server.client.post("/v1/completions", json=BODY, headers=HEADERS)
        line = line_with(server, "(request seek-me)")
        assert line.startswith(
            "INFO: agent/1.0 127.0.0.1 POST /v1/completions (openai), 200 finished, test/tiny@cuda ("
        )
        assert reply.headers["x-exo-route"] in line
        times = r"queue [\d.]+ s, load [\d.]+ s, first token [\d.]+ s"
        facts = rf", {times}, 18 tokens in \(0 cached\), 3 out, [\d.]+ s, length \(request"
        assert re.search(facts, line), line
        assert "secret" not in server.log.read_text()


def test_a_line_of_json(tmp_path: Path) -> None:
    with serving(tmp_path, EXO_LOG_JSON="1") as server:
        reply = server.client.post("/v1/completions", json={**BODY, "stream": True}, headers=HEADERS)
        line: dict[str, Any] = json.loads(line_with(server, '"access"', "seek-me"))
        known = {"level": "info", "request": "seek-me", "client": "agent/1.0 127.0.0.1", "method": "POST"}
        known |= {"path": "/v1/completions", "dialect": "openai", "model": "test/tiny", "runner": "cuda"}
        known |= {"route": reply.headers["x-exo-route"], "status": 200, "error": None, "finish_reason": "length"}
        known |= {"prompt_tokens": 18, "cached_tokens": 0, "completion_tokens": 3, "phase": "finished"}
        assert {name: line[name] for name in known} == known
        assert 0 < line["first_token_s"] <= line["seconds"]
        assert 0 <= line["queue_s"] <= line["seconds"]
        assert all(json.loads(each)["level"] for each in server.log.read_text().splitlines())
        assert "secret" not in server.log.read_text()


def test_prompts_are_logged_if_the_operator_wants_that(tmp_path: Path) -> None:
    with serving(tmp_path, EXO_LOG_JSON="1", EXO_LOG_PROMPTS="1") as server:
        assert server.client.post("/v1/completions", json=BODY, headers=HEADERS).status_code == 200
        assert json.loads(line_with(server, '"access"', "seek-me"))["prompts"] == [BODY["prompt"]]


def test_refused_requests_and_no_monitors(tmp_path: Path) -> None:
    with serving(tmp_path, EXO_API_KEY="correct-horse") as server:
        key = {"authorization": "Bearer correct-horse"}
        assert server.client.post("/v1/completions", json=BODY).status_code == 401
        unknown = {**BODY, "model": "a\nINFO: forged"}
        assert server.client.post("/v1/completions", json=unknown, headers=key).status_code == 404
        assert server.client.get("/v1/instances", headers=key).status_code == 200
        assert server.client.get("/v1/activity").status_code == 401
        url = server.url.removeprefix("http://").split(":")
        with socket.create_connection((url[0], int(url[1]))) as connection:
            connection.sendall(b"no request at all\r\n\r\n")
            while connection.recv(1024):
                pass
        assert "no reply" not in line_with(server, "/v1/completions", "401 failed invalid_api_key")
        line_with(server, "/v1/completions", "404 failed model_not_found")
        line_with(server, "/v1/activity", "401 failed invalid_api_key")
        line_with(server, "127.0.0.1, 400 failed malformed_request")
        log = server.log.read_text()
        assert "/v1/instances" not in log
        assert not any(line.startswith("INFO: forged") for line in log.splitlines())
        assert "correct-horse" not in log


def test_a_line_names_the_api(tmp_path: Path) -> None:
    paths = {"/": "exo", "/docs": "exo", "/api/tags": "ollama", "/v1/models": "openai", "/slots": "llama-server"}
    with serving(tmp_path) as server:
        for path, dialect in paths.items():
            assert server.client.get(path).status_code == 200
            line_with(server, f"GET {path} ({dialect}), 200")


def test_a_path_forges_no_line(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.client.get("/x%0aINFO:%20forged%1b[2J").status_code == 404
        line = line_with(server, "forged")
        assert line.startswith("INFO: python-httpx")
        assert "\x1b" not in line


def test_a_client_that_leaves(tmp_path: Path) -> None:
    write_card(tmp_path, "slow", {"cuda": {"step_seconds": 0.02}}, backends=["LlamaCppCpu"])
    with serving(tmp_path) as server:
        body = {**BODY, "model": "slow", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body, headers=HEADERS) as reply:
            next(reply.iter_lines())
        assert "200 cancelled, test/slow@cuda" in line_with(server, "(request seek-me)", "POST")
