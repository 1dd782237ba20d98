"""Measures upstream's node as it is and with the adapter: ``python -m tests.support.upstream_node.before_after``.

EXO_UPSTREAM and EXO_UPSTREAM_PYTHON are as in ``tests/integrations/test_upstream_node.py``. A tiny model is there
twice, with the same weights: as a GGUF file and as a folder for MLX. Each line of the output is one figure. The streams
are of the first of both that the node can serve.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.tokenizer import CHAT_TEMPLATE
from tests.support.upstream_node.edits import edited, unedited
from tests.support.upstream_node.node import add_model, running, state

FILE = "model.gguf"
GGUF, MLX = "me/tiny-gguf", "me/tiny-mlx"
SHAPE = Shape(context_length=8192)
CARD = """model_id = "{model}"
n_layers = 2
hidden_size = 64
supports_tensor = false
tasks = ["TextGeneration"]
backends = {backends}
{files}
[storage_size]
in_bytes = 1000000
"""
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
TEMPLATE = REFUSES + CHAT_TEMPLATE
TABLE = {"n_ctx": 8192, "slots": 4, "chat_template": TEMPLATE}
READY_SECONDS, ANSWER_SECONDS, STREAM_SECONDS = 30.0, 30.0, 240.0
TOKENS = 300
QUESTION = [{"role": "user", "content": "Name three rivers."}]


def main() -> None:
    """Prints the figures of both trees, or of the one that the command line names."""
    checkout, python = Path(os.environ["EXO_UPSTREAM"]), os.environ["EXO_UPSTREAM_PYTHON"]
    for name, make in (("before", unedited), ("after", edited)):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with TemporaryDirectory() as folder:
            home = Path(folder, "home")
            home.mkdir()
            _give_models(home, with_adapter=name == "after")
            _measure(name, make(checkout, Path(folder, "tree")), home, python)


def _give_models(home: Path, *, with_adapter: bool) -> None:
    """Without the adapter, upstream refuses model cards with back ends or fields that it does not know."""
    backends = ["LlamaCppCpu"] if with_adapter else ["MlxCpu"]
    files = f'files = ["{FILE}"]\n' if with_adapter else ""
    gguf = add_model(home, GGUF, CARD.format(model=GGUF, backends=json.dumps(backends), files=files))
    write_gguf(gguf / FILE, SHAPE)
    mlx = add_model(home, MLX, CARD.format(model=MLX, backends='["MlxCpu"]', files=""))
    write_mlx(mlx, SHAPE)
    (mlx / "chat_template.jinja").write_text(TEMPLATE)
    (mlx / "model.safetensors.index.json").write_text('{"weight_map": {"all": "model.safetensors"}}')


def _measure(name: str, tree: Path, home: Path, python: str) -> None:
    def tell(what: str, found: object) -> None:
        print(json.dumps([name, what, found]), flush=True)

    began = time.monotonic()
    with running(tree, home, python, TABLE) as node:
        tell("seconds until the node knows its back ends", round(time.monotonic() - began, 1))
        tell("MiB of the node", _mebibytes())
        tell("back ends", next(iter(state(node, "nodeBackends").values())))
        listed = node.get("/v1/models", params={"status": "downloaded"}).json()["data"]
        tell("models on disk", [each["id"] for each in listed])
        disturbed = False
        for model in (GGUF, MLX):
            tell(f"{model}: previews", _previews(node, model))
            tell(f"{model}: placed", _placed(node, model))
            answer = _answer(node, model)
            tell(f"{model}: answer", answer)
            if answer.startswith("200") and not disturbed:
                disturbed = True
                _disturb(node, model, tell)
            _delete_all(node)


def _mebibytes() -> int:
    family = psutil.Process().children(recursive=True)
    return round(sum(each.memory_full_info().pss for each in family) / (1 << 20))


def _previews(node: httpx.Client, model: str) -> list[str]:
    reply = node.get("/instance/previews", params={"model_id": model})
    if reply.status_code != 200:
        return [f"{reply.status_code}: {reply.text[:200]}"]
    shown = reply.json()["previews"]
    return sorted({each["error"] or next(iter(each["instance"])) for each in shown})


def _placed(node: httpx.Client, model: str) -> dict[str, Any]:
    """Waits until a runner is ready or has failed, for so long."""
    began = time.monotonic()
    reply = node.post("/place_instance", json={"model_id": model})
    told: dict[str, Any] = {"status": reply.status_code}
    while time.monotonic() < began + READY_SECONDS:
        told["runners"] = _runners(node)
        if any(tag in each for each in told["runners"] for tag in ("RunnerReady", "RunnerFailed")):
            break
        time.sleep(0.1)
    told["seconds"] = round(time.monotonic() - began, 1)
    downloads: dict[str, list[dict[str, Any]]] = state(node, "downloads") or {}
    told["downloads"] = sorted({tag for mine in downloads.values() for each in mine for tag in each})
    return told


def _runners(node: httpx.Client) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = state(node, "runners") or {}
    return list(found.values())


def _is_ready(node: httpx.Client) -> bool:
    return any("RunnerReady" in each for each in _runners(node))


def _answer(node: httpx.Client, model: str, **fields: Any) -> str:  # noqa: ANN401 -- JSON
    body = {"model": model, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **fields}
    began = time.monotonic()
    try:
        reply = node.post("/v1/chat/completions", json=body, timeout=ANSWER_SECONDS)
    except httpx.HTTPError as error:
        return f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
    return f"{reply.status_code} after {time.monotonic() - began:.1f} s: {reply.text.strip()[-300:]}"


@dataclass
class Stream:
    """The pieces of a streamed reply, with the times at which they came."""

    times: list[float] = field(default_factory=list[float])
    end: str = ""

    def read(self, node: httpx.Client, model: str) -> None:
        """Reads until the reply ends. It has a fixed number of tokens."""
        body = {"model": model, "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        try:
            with node.stream("POST", "/bench/chat/completions", json=body, timeout=STREAM_SECONDS) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        self.times.append(time.monotonic())
                        self.end = line[6:][-200:]
        except httpx.HTTPError as error:
            self.end = type(error).__name__

    def pause(self, since: float) -> float:
        """The longest time between two pieces, the second of which came later than ``since``."""
        return max((later - earlier for earlier, later in pairwise(self.times) if later > since), default=0.0)


def _disturb(node: httpx.Client, model: str, tell: Callable[[str, object], None]) -> None:
    """What happens to a stream meanwhile."""
    events: dict[str, Callable[[], str]] = {
        "nothing": lambda: "",
        "a prompt of 1,500 words": lambda: _answer(node, model, messages=_words(1500), max_tokens=1, stream=True),
        "a prompt of 10,000 words": lambda: _answer(node, model, messages=_words(10_000), max_tokens=1, stream=True),
        "a system message, which the chat template refuses": lambda: _answer(
            node, model, messages=[{"role": "system", "content": "Be brief."}, *QUESTION], stream=True
        ),
        "SIGKILL of the process with the model": _kill_the_largest,
    }
    for event, happen in events.items():
        if not _ready_again(node):
            tell(f"{model}: stream beside {event}", "no runner is ready")
            return
        stream = Stream()
        with ThreadPoolExecutor(1) as pool:
            reading: Future[None] = pool.submit(stream.read, node, model)
            while len(stream.times) < 10 and not reading.done():
                time.sleep(0.01)
            began = time.monotonic()
            said = happen()
            took = time.monotonic() - began
        tell(
            f"{model}: stream beside {event}",
            {
                "pieces": len(stream.times),
                "longest pause": round(stream.pause(began), 3),
                "event": said,
                "event seconds": round(took, 1),
                "end": stream.end,
            },
        )
    began = time.monotonic()
    again = _ready_again(node)
    tell(f"{model}: seconds until it is ready again", round(time.monotonic() - began, 1) if again else None)
    tell(f"{model}: answer then", _answer(node, model))


def _words(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "word " * number}]


def _ready_again(node: httpx.Client) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while not _is_ready(node):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _kill_the_largest() -> str:
    """The processes of the node itself are smaller than the one with the model."""
    family = psutil.Process().children(recursive=True)
    largest = max(family[1:], key=lambda each: each.memory_info().rss)
    name = " ".join(largest.cmdline()[-3:])
    largest.kill()
    return name


def _delete_all(node: httpx.Client) -> None:
    instances: dict[str, Any] = state(node, "instances") or {}
    for instance in instances:
        node.delete(f"/instance/{instance}")
    deadline = time.monotonic() + READY_SECONDS
    while _runners(node) and time.monotonic() < deadline:
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
