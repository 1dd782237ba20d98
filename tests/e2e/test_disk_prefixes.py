"""Computed prompts outlive runners and servers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.program import DEADLINE_SECONDS
from tests.support.server import ServeProgram, environment, write_card
from tests.support.tiny import Shape, write_gguf
from tests.support.twins import FLOAT32

PROMPT = "once upon a time there was a tiny model " * 60


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    write_gguf(tmp_path / "tiny.gguf", Shape())
    table = {**FLOAT32, "n_ctx": 8192, "slots": 2}
    write_card(home, "tiny", {"cuda": {"path": str(tmp_path / "tiny.gguf"), **table}}, backends=["LlamaCppCpu"])
    return home


def asked(server: ServeProgram, prompt: str = PROMPT) -> tuple[str, int, int]:
    """The answer, the tokens of the prompt, and how many of them were not computed."""
    reply = server.complete("tiny", prompt=prompt, max_tokens=20, temperature=0, ignore_eos=True)
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    return reply.json()["choices"][0]["text"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def files(home: Path) -> list[Path]:
    return list(home.glob("prefix_cache-*/test--tiny/*/*.prefix"))


def prefixes(server: ServeProgram) -> dict[str, int]:
    rows: list[dict[str, Any]] = server.client.get("/v1/instances").json()["data"]
    return rows[0]["prefixes"] or {"prompts": 0}


def exo(home: Path, server: ServeProgram | None, *arguments: str) -> str:
    port = [] if server is None else ["--port", str(httpx.URL(server.url).port)]
    command = [sys.executable, "-m", "exo", *arguments, *port]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prompt_is_not_computed_again_after_a_stop_or_a_crash_of_the_server(home: Path) -> None:
    with ServeProgram(home) as server:
        first, length, cached = asked(server)
        assert cached == 0
        exo(home, server, "stop", "tiny")
        assert len(files(home)) == 1
        again, _, cached = asked(server)
        assert (again, cached) == (first, length - 1)
        until(lambda: prefixes(server)["prompts"])
        assert prefixes(server)["from_disk"] == 1
        shown = exo(home, server, "ps")
        assert "test/tiny@cuda: of 1 prompts, prefixes were found: 0 in a slot, 0 in RAM, 1 on disk" in shown
        longer = asked(server, PROMPT + first + "and then " * 100)
        until(lambda: prefixes(server)["from_slots"])
        os.kill(server.process.pid, signal.SIGKILL)
    with ServeProgram(home) as server:
        assert asked(server)[::2] == (first, length - 1)
        answer, _, cached = asked(server, PROMPT + first + "and then " * 100)
        assert answer == longer[0]
        assert cached >= length
        exo(home, server, "stop", "tiny")
        assert "bytes of computed prompts" in exo(home, server, "rm", "tiny", "--yes")
    assert files(home) == []


def test_a_request_that_outlives_its_runner_goes_on_from_the_file(home: Path) -> None:
    with ServeProgram(home) as server:
        expected, length, _ = asked(server)
        until(lambda: files(home))
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
        with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
            first = next(lines)
            (runner,) = server.runners()
            os.kill(runner.pid, signal.SIGKILL)
            assert sum(1 for _ in lines) > 100
        assert first
        until(lambda: prefixes(server)["prompts"])
        assert prefixes(server)["from_disk"] == 1
        assert prefixes(server)["tokens"] >= length - 1
        assert asked(server)[0] == expected
