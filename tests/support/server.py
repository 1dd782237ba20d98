"""``exo serve`` as a program, in a directory of its own, with real runners."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
from pydantic import JsonValue

from tests import ROOT
from tests.support.program import DEADLINE_SECONDS


def write_card(home: Path, name: str, engines: Mapping[str, Mapping[str, JsonValue]], **fields: JsonValue) -> None:
    """Writes a user's model card for ``name`` under ``EXO_HOME``, with a table for each engine."""
    card: dict[str, JsonValue] = {
        "model_id": f"test/{name}",
        "aliases": [name],
        "backends": ["LlamaCppCuda", "LlamaCppCpu"],
        "n_layers": 2,
        "hidden_size": 64,
        "supports_tensor": False,
        "tasks": ["TextGeneration"],
        **fields,
    }
    lines = [f"{key} = {_toml(value)}" for key, value in card.items()]
    for table, values in {"storage_size": {"in_bytes": 1}, **engines}.items():
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    folder = home / "custom_model_cards"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text("\n".join(lines) + "\n")


def _toml(value: JsonValue) -> str:
    """Anything but null. Tables are written inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def long_story(tokens: int) -> dict[str, object]:
    """A request for text that is sampled, the same for every engine, and never ends early."""
    return {"prompt": "once upon a time", "max_tokens": tokens, "ignore_eos": True, "temperature": 0.9, "seed": 5}


def inherited() -> dict[str, str]:
    """The environment without the variables that the MLX runner's code sets, which some tests import."""
    return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}


def environment(home: Path) -> dict[str, str]:
    """A home of its own. The models that other programs keep on this machine are left out."""
    own = {"EXO_HOME": str(home), "EXO_FIND_MODELS": "0", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    return {**inherited(), **own}


def without_vllm(folder: Path) -> str:
    """exo's Python in an environment beside which the vLLM runner has none, unless a test makes one in ``folder``."""
    (folder / ".venv").symlink_to(sys.prefix)
    return str(folder / ".venv" / "bin" / "python")


class ServeProgram:
    """Starts on a free port; ends with the context. ``url`` is set when it listens."""

    def __init__(
        self, home: Path, *arguments: str, fake: bool = False, python: str = sys.executable, **variables: str
    ) -> None:
        """``variables`` are added to the environment. ``fake``: with the fake runner."""
        program = ("tests.support.fake_serve",) if fake else ("exo", "serve", "--port", "0")
        self.log = home / "serve.log"
        home.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, "-m", *program, *arguments],
                env={**environment(home), **variables},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "listening on http" in line, line + self.log.read_text()
        self.url = line.split()[4]
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        children = self.children()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(DEADLINE_SECONDS)
        finally:
            for process in (self.process, *children):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def runners(self) -> list[psutil.Process]:
        return [child for child in self.children() if is_runner(child)]

    def complete(self, model: str, **body: object) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": model, "prompt": "once upon a time", **body})


def is_runner(process: psutil.Process) -> bool:
    """Whether a process has a model; a probe has none."""
    try:
        command = process.cmdline()
        modules = [part for part in command if "exo.worker.runner_" in part and "runner_common" not in part]
        return bool(modules) and "--probe" not in command
    except psutil.NoSuchProcess:  # or has died and is not reaped yet
        return False
