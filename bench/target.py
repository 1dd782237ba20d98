"""The models under faults, and the requests of their streams."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from bench.direct_runner import DirectRunner
from exo.cards.catalogue import Catalogue
from exo.compare.engine import ComparedEngine, choose_engine
from exo.compare.scoring import score
from exo.config import Settings
from exo.worker.protocol.runners import runner_commands
from exo.worker.supervisor.host_probe import probe_host
from tests.support.server import write_card
from tests.support.tiny import Shape, write_gguf, write_mlx

STREAMS = 8
_LOADS = 3
_STORIES = (
    "The lighthouse keeper climbed the stairs every evening and",
    "In the year the river froze, two brothers decided to",
    "A short history of the bicycle begins with",
    "The recipe is simple: take three eggs, some flour and",
    "When the train stopped between two stations, nobody",
    "The most important thing about a good garden is",
    "Scientists who study the ocean floor have found that",
    "My grandmother kept her letters in a wooden box, and",
)
assert len(_STORIES) == STREAMS


@dataclass(frozen=True, slots=True)
class LoadTime:
    """Seconds of a runner's start: until it begins to load the model, and from there until it is ready."""

    start: float
    load: float


@dataclass(frozen=True, slots=True)
class FaultTarget:
    """A model that ``exo serve`` with ``arguments`` can serve, and the ``STREAMS`` streams that run on it."""

    name: Literal["tiny", "demo"]
    engine: ComparedEngine
    prompts: tuple[str | tuple[int, ...], ...]
    tokens: int
    sampling: Mapping[str, object]
    longest_pause: float
    """The longest time from a token to the next fault in seconds. A stream must progress in between."""
    exact: bool
    """Whether a replay must give the tokens of the undisturbed run. Otherwise a near-tie may be decided differently."""
    arguments: tuple[str, ...] = ()

    def body(self, number: int) -> dict[str, object]:
        """The request of a stream without the number of tokens."""
        return {
            "model": f"{self.engine.load.model_id}@{self.engine.name}",
            "prompt": self.prompts[number],
            "seed": number,
            "ignore_eos": True,
            **self.sampling,
        }

    def ids(self, number: int) -> tuple[int, ...]:
        """The prompt of a stream of the demo model."""
        prompt = self.prompts[number]
        assert not isinstance(prompt, str)
        return prompt


async def tiny(home: Path, runner: str, n_ctx: int = 2048) -> FaultTarget:
    """Random weights in float32, so that rounding has no effect; sampled, so that texts do not repeat themselves."""
    shape = Shape(context_length=n_ctx)
    size: dict[str, JsonValue] = {"n_ctx": n_ctx, "slots": STREAMS}
    flat: dict[str, JsonValue] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "threads": 1}
    if runner == "cuda":
        write_gguf(home / "tiny.gguf", shape)
        table = {"path": str(home / "tiny.gguf"), **flat, **size}
    else:
        write_mlx(home / "tiny", shape)
        table = {"path": str(home / "tiny"), "dtype": "float32", **size}
    write_card(home, "tiny", {runner: table}, backends=["LlamaCppCpu", "MlxCpu"], runner=runner)
    engine = await _engine(Catalogue.load(home / "custom_model_cards"), "test/tiny", runner)
    prompts = tuple(f"story {number}" for number in range(STREAMS))
    return FaultTarget("tiny", engine, prompts, 1500, {"temperature": 0.9}, longest_pause=0.6, exact=True)


async def demo(tokens: int = 96) -> FaultTarget:
    """The demo model as ``make run`` serves it on llama.cpp: quantised, so rounding may change greedy choices."""
    models = Settings.load().models_directory
    if not (models / "google--gemma-3-270m").is_dir():
        raise SystemExit("the demo model is not on disk; `make demo-model` fetches it")
    engine = await _engine(Catalogue.load(), "google/gemma-3-270m", "cuda", str(models))
    with tempfile.TemporaryDirectory() as directory:
        prompts = (await score(engine, _STORIES, Path(directory))).tokens
    sampling, arguments = {"temperature": 0}, ("--models-dir", str(models))
    return FaultTarget("demo", engine, prompts, tokens, sampling, longest_pause=4.0, exact=False, arguments=arguments)


async def _engine(catalogue: Catalogue, model_id: str, runner: str, *directories: str) -> ComparedEngine:
    card = catalogue.cards[model_id]
    return choose_engine(runner, card, await probe_host(), runner_commands(), directories)


def load_time(engine: ComparedEngine) -> LoadTime:
    """The median of a few starts with nothing else running."""
    times: list[LoadTime] = []
    for _ in range(_LOADS):
        began = time.perf_counter()
        with DirectRunner(engine.command, engine.load) as runner:
            times.append(LoadTime(runner.began_to_load - began, runner.ready - runner.began_to_load))
    return sorted(times, key=lambda each: each.start + each.load)[_LOADS // 2]
