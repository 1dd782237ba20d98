"""The servers that take turns, each with the same model file, threads, context and cache as the others."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import httpx
import psutil
from pydantic import JsonValue

import exo
from bench.mlx_server import BIAS, CARD, free_port
from bench.peers_setup import LLAMA_SERVER, PYTHON, binary
from exo.config import Settings

SLOTS, CONTEXT = 16, 4096
"""Of exo's card of the demo model; ``CONTEXT`` tokens in each slot. The cache is of f16, as everybody's default is."""
THREADS = psutil.cpu_count(logical=False) or 1
DEMO_CARD = Path(exo.__file__).parent / "cards" / "built_in" / "gemma-3-270m.toml"
_START_SECONDS = 180.0

Name = Literal["exo", "exo, speculating", "llama-server", "llama-cpp-python", "exo on MLX", "mlx_lm.server"]


@dataclass(frozen=True, slots=True)
class Server:
    """One server: how it is started, how it is asked, and what it is."""

    name: Name
    version: str
    command: list[str]
    url: str
    model: str
    ready: str
    """A path that answers with 200 once the model can."""
    extra: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """What goes into each request beside what all servers are asked."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    card: str = ""
    """A line that its model card has and the built-in one has not."""

    @property
    def flags(self) -> str:
        """How it was started, in words that hold on any machine."""
        shown = (Path(word).name if word.startswith("/") else word for word in self.command)
        words = " ".join(word for word in shown if word != str(httpx.URL(self.url).port))
        return f"{words}, with {self.card} in the card" if self.card else words

    @contextmanager
    def running(self, log: Path) -> Generator[None]:
        """From the moment that it can answer to the end of the block; what it says goes to ``log``."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **self.environment}
            )
            try:
                self._wait(process, log)
                yield
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(self.url + self.ready, timeout=60).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{self.name} does not start; its log ends with:\n{end}")


def demo_model() -> Path:
    """The demo model's file."""
    file = Settings.load().models_directory / "google--gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
    return file if file.exists() else sys.exit("the demo model is not there; make demo-model fetches it")


def exo_server(home: Path) -> Server:
    """``exo serve`` with the built-in card."""
    return demo_server("exo", home / "exo")


def speculating_server(home: Path) -> Server:
    """The same, but for one line of the card."""
    return demo_server("exo, speculating", home / "exo-speculating", ('speculate = "auto"',))


def demo_server(name: Name, home: Path, lines: Sequence[str] = ()) -> Server:
    """``exo serve`` with its data in ``home`` and the built-in model card, in which ``lines`` replace their keys."""
    if lines:
        keys = tuple(line.partition(" ")[0] + " " for line in lines)
        kept = [line for line in DEMO_CARD.read_text().splitlines() if not line.startswith(keys)]
        at = kept.index("[cuda]") + 1
        cards = home / "custom_model_cards"
        cards.mkdir(parents=True)
        (cards / "gemma-3-270m.toml").write_text("\n".join([*kept[:at], *lines, *kept[at:]]) + "\n")
    card = ", ".join(lines)
    url, port = free_address()
    models = str(Settings.load().models_directory)
    command = [sys.executable, "-m", "exo", "serve", "--port", port, "--models-dir", models, "--load", "gemma-3-270m"]
    environment = {"EXO_HOME": str(home)}
    return Server(
        name, exo.__version__, command, url, "gemma-3-270m@cuda", "/ready", environment=environment, card=card
    )


def llama_server() -> Server:
    """llama.cpp's server, with split KV as exo has it; all else by its defaults."""
    url, port = free_address()
    command = [str(binary("llama-server")), "-m", str(demo_model()), "--port", port, *engine_flags()]
    command += ["-np", str(SLOTS), "--no-webui"]
    return Server("llama-server", LLAMA_SERVER.replace("==", " "), command, url, "demo", "/health")


def engine_flags(slots: int = SLOTS, context: int = CONTEXT) -> list[str]:
    """What llama.cpp's programs have in common, with ``context`` tokens in each slot."""
    return ["-t", str(THREADS), "-tb", str(THREADS), "-c", str(slots * context), "-no-kvu"]


def bindings_server() -> Server:
    """llama-cpp-python's server. It has one sequence; told not to drop one request for the next, it queues them."""
    url, port = free_address()
    command = [str(PYTHON), "-m", "llama_cpp.server", "--model", str(demo_model()), "--port", port]
    command += ["--n_ctx", str(CONTEXT), "--n_threads", str(THREADS), "--n_threads_batch", str(THREADS)]
    command += ["--flash_attn", "true", "--logits_all", "false", "--interrupt_requests", "false", "--verbose", "false"]
    return Server("llama-cpp-python", version("llama-cpp-python"), command, url, "demo", "/v1/models")


def mlx_servers(home: Path, folder: Path) -> tuple[Server, Server]:
    """The MLX runner of exo and mlx_lm.server, on a tiny model in ``folder``."""
    cards = home / "exo-mlx" / "custom_model_cards"
    cards.mkdir(parents=True)
    (cards / "twin.toml").write_text(CARD.format(path=json.dumps(str(folder))))
    ours, our_port = free_address()
    theirs, their_port = free_address()
    serve = [sys.executable, "-m", "exo", "serve", "--port", our_port, "--load", "test/twin"]
    mlx_lm = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", their_port]
    extra: dict[str, JsonValue] = {"logit_bias": dict(BIAS)}
    home_of_exo = {"EXO_HOME": str(home / "exo-mlx")}
    mlx_lm_version = version("mlx-lm")
    return (
        Server("exo on MLX", exo.__version__, serve, ours, "test/twin", "/ready", extra, home_of_exo),
        Server("mlx_lm.server", mlx_lm_version, mlx_lm, theirs, str(folder), "/health", extra),
    )


def free_address() -> tuple[str, str]:
    port = free_port()
    return f"http://127.0.0.1:{port}", str(port)
