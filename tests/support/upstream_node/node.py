"""Upstream's node as a process, from a copy of its package, with models that are on disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import JsonValue

DEADLINE_SECONDS = 240.0


def environment(tree: Path, home: Path, table: Mapping[str, JsonValue]) -> dict[str, str]:
    """Upstream's, without this environment's settings of exo. ``table`` is the adapter's ``EXO_LLAMA_CPP_TABLE``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("EXO_", "PYTHON"))}
    return {
        **inherited,
        "PYTHONPATH": str(tree),
        "PYTHONSAFEPATH": "1",
        "EXO_HOME": str(home),
        "EXO_OFFLINE": "true",
        "EXO_RESOURCES_DIR": str(home / "resources"),
        "EXO_DASHBOARD_DIR": str(home),
        "EXO_MODELS_READ_ONLY_DIRS": str(home / "given"),
        "EXO_LLAMA_CPP_PYTHON": sys.executable,
        "EXO_LLAMA_CPP_TABLE": json.dumps(table),
    }


def add_model(home: Path, model: str, card: str) -> Path:
    """Writes a model card, and returns the folder for the model's files."""
    name = model.replace("/", "--")
    cards, folder = home / "resources" / "inference_model_cards", home / "given" / name
    cards.mkdir(parents=True, exist_ok=True)
    (cards / f"{name}.toml").write_text(card)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def running(tree: Path, home: Path, python: str, table: Mapping[str, JsonValue]) -> Generator[httpx.Client]:
    """A client of the node once the node knows its back ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = home / "node.log"
    with log.open("wb") as output:
        command = [python, "-m", "exo", "--offline", "--api-port", str(port)]
        process = subprocess.Popen(command, env=environment(tree, home, table), cwd=home, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE_SECONDS) as client:
            until(lambda: process.poll() is not None or bool(state(client, "nodeBackends")))
            assert process.poll() is None, log.read_text()[-4000:]
            yield client
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(node: httpx.Client, part: str) -> Any:  # noqa: ANN401 -- JSON
    with suppress(httpx.TransportError):
        reply = node.get(f"/state/{part}")
        return reply.json() if reply.status_code == 200 else None
    return None


def statuses(node: httpx.Client) -> list[str]:
    runners: dict[str, dict[str, object]] = state(node, "runners") or {}
    return [next(iter(each)) for each in runners.values()]
