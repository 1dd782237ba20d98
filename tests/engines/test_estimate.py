"""How much memory each runner says that a model will take, against what its process then has.

Resident bytes of the process, once every slot has been used, one context has been full and a text has been embedded.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from pydantic import JsonValue

from exo.cards.catalogue import Catalogue
from exo.config import Settings
from exo.worker.protocol.commands import Embed, Estimate, Load, Text
from exo.worker.protocol.events import Failed, LoadOption
from exo.worker.protocol.runners import RUNNERS
from tests.conftest import needs_vllm
from tests.support.pictures import random_picture
from tests.support.program import Program, ask
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.projector import Sizes, write_projector
from tests.support.tiny.shape import ARCHITECTURES, Architecture

TOLERANCE = 0.1
DEMO = Settings.load().models_directory / "google--gemma-3-270m"


@dataclass(frozen=True, slots=True)
class Case:
    runner: str
    load: Load
    longest: int
    """Tokens of the prompt that fills a slot."""


def load(runner: str, path: Path, **table: JsonValue) -> Load:
    owns: dict[str, dict[str, JsonValue]] = {
        "cuda": {"threads": 1, "prefix_cache_bytes": 0},
        "vllm": {"threads": 1, "dtype": "float32"},
    }
    own = owns.get(runner, {})
    backend = {"cuda": "LlamaCppCpu", "mlx": "MlxCpu", "vllm": "Vllm"}[runner]
    return Load(model_id="test/tiny", backend=backend, table={"path": str(path), **own, **table})


def write(folder: Path, runner: str, shape: Shape) -> Path:
    path = folder / (f"{shape.architecture}.gguf" if runner == "cuda" else shape.architecture)
    (write_gguf if runner == "cuda" else write_mlx)(path, shape)
    return path


def start(runner: str) -> Program:
    return Program(RUNNERS[runner].command)


def choices(program: Program, command: Load) -> tuple[LoadOption, ...]:
    program.send(Estimate(load=command))
    program.until(lambda: program.estimated is not None)
    assert program.estimated is not None
    return program.estimated.choices


def prompt(length: int, first: int) -> list[int]:
    """Token ids that no other slot's prompt begins with."""
    return [(first + at) % 200 + 1 for at in range(length)]


def compare(case: Case) -> None:
    with start(case.runner) as program:
        choice = choices(program, case.load)[0]
        capabilities = program.load(case.load.model_copy(update={"table": {**case.load.table, **choice.settings}}))
        process = psutil.Process(program.process.pid)
        at_first = process.memory_info().rss
        lengths = [case.longest, *[40] * (capabilities.slots - 1)]
        program.generate(*(ask(f"{at}", prompt(length, at), max_tokens=2) for at, length in enumerate(lengths)))
        if case.runner == "cuda":
            scored = ask("scored", prompt(40, 9), max_tokens=1)
            program.generate(scored.model_copy(update={"prompt_logprobs": 1}))
        if capabilities.embeddings:
            program.generate(Embed(id="text", prompt=tuple(prompt(min(case.longest, 2040), 7))))
        at_work = process.memory_info().rss
    what = f"{choice.parts}; now {at_first:,}, at work {at_work:,}"
    assert choice.host == pytest.approx(at_work, rel=TOLERANCE), what
    assert choice.host - choice.later_host == pytest.approx(at_first, rel=TOLERANCE), what
    assert choice.device == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("runner", ["cuda", "mlx"])
def test_a_tiny_models_estimate_is_what_its_process_has(
    tmp_path: Path, runner: str, architecture: Architecture
) -> None:
    path = write(tmp_path, runner, Shape(architecture))
    compare(Case(runner, load(runner, path, n_ctx=4096, slots=4), 4090))


@pytest.mark.parametrize("runner", ["cuda", "mlx", pytest.param("vllm", marks=needs_vllm)])
def test_a_large_kv_cache_is_counted(tmp_path: Path, runner: str) -> None:
    path = write(tmp_path, runner, Shape("llama", heads=4, kv_heads=4, head_dim=64))
    compare(Case(runner, load(runner, path, n_ctx=4096, slots=32), 300))


def test_a_pool_is_counted_once_for_all_slots(tmp_path: Path) -> None:
    path = write(tmp_path, "cuda", Shape("llama", heads=4, kv_heads=4, head_dim=64))
    compare(Case("cuda", load("cuda", path, n_ctx=8192, slots=4, kv="pool"), 7900))


@pytest.mark.parametrize("runner", ["mlx", pytest.param("vllm", marks=needs_vllm)])
def test_window_layers_take_the_whole_context_in_mlx_and_vllm(tmp_path: Path, runner: str) -> None:
    path = write(tmp_path, runner, Shape("gemma3", heads=4, kv_heads=4, head_dim=64))
    compare(Case(runner, load(runner, path, n_ctx=4096, slots=8), 300))


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_the_cache_types_are_counted(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, "cuda", Shape("llama", heads=4, kv_heads=4, head_dim=64))
    compare(Case("cuda", load("cuda", path, n_ctx=4096, slots=16, cache_type_k=kind, cache_type_v=kind), 300))


@pytest.fixture(scope="module")
def demo() -> Path:
    assert DEMO.is_dir(), "make demo-model fetches the demo model"
    return DEMO


def demo_table(runner: str) -> dict[str, JsonValue]:
    card = Catalogue.load().get("gemma-3-270m")
    assert card is not None
    return {**card.engines[runner], "slots": 2, "n_ctx": 1024, "prefix_cache_bytes": 0}


@pytest.mark.parametrize("backend_sampling", ["off", "on"])
def test_the_demo_models_estimate_is_what_its_process_has(demo: Path, backend_sampling: str) -> None:
    command = Load(
        model_id="google/gemma-3-270m",
        backend="LlamaCppCpu",
        table={**demo_table("cuda"), "threads": 2, "backend_sampling": backend_sampling},
        directories=(str(demo.parent),),
    )
    compare(Case("cuda", command, 160))


def test_the_prefix_cache_is_counted_but_not_taken_by_loading(tmp_path: Path) -> None:
    path = write(tmp_path, "cuda", Shape("llama"))
    with start("cuda") as program:
        (without,) = choices(program, load("cuda", path, n_ctx=4096, slots=4))
    with start("cuda") as program:
        (choice,) = choices(program, load("cuda", path, n_ctx=4096, slots=4, prefix_cache_bytes=100_000_000))
    assert choice.host - without.host == choice.later_host - without.later_host == 100_000_000


def test_a_filled_prefix_cache_takes_what_was_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "cuda", Shape("llama", heads=4, kv_heads=4, head_dim=64))
    case = load("cuda", path, n_ctx=1024, slots=2, prefix_cache_bytes=100_000_000)
    with start("cuda") as program:
        (choice,) = choices(program, case)
        program.load(case)
        process = psutil.Process(program.process.pid)
        at_first = process.memory_info().rss
        for at in range(60):
            program.generate(ask(f"{at}", prompt(1000, at), max_tokens=1))
        program.generate(Embed(id="text", prompt=tuple(prompt(1020, 7))))
        filled = process.memory_info().rss
    assert filled - at_first > 90_000_000
    assert choice.host == pytest.approx(filled, rel=TOLERANCE), f"{choice.parts}; now {filled:,}"


def test_a_projector_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "cuda", Shape("llama"))
    sizes = Sizes(side=448, patch=14, width=1024, feed_forward=4096, heads=16)
    write_projector(tmp_path / "mmproj.gguf", "mlp", 64, sizes)
    case = load("cuda", path, n_ctx=2048, slots=1, mmproj="mmproj.gguf")
    with start("cuda") as program:
        (choice,) = choices(program, case)
        program.load(case)
        process = psutil.Process(program.process.pid)
        at_first = process.memory_info().rss
        prompt = Text(text="a"), random_picture(1, 2048, 2048), Text(text="b")
        (result,) = program.generate(ask("seen").model_copy(update={"prompt": prompt}))
        assert result.finished.usage.prompt_tokens == 2 + sizes.patches
        at_work = process.memory_info().rss
    what = f"{choice.parts}; now {at_first:,}, at work {at_work:,}"
    assert choice.host - choice.later_host == pytest.approx(at_first, rel=TOLERANCE), what
    assert at_work < choice.host < at_work + (128 << 20), what


@pytest.mark.parametrize("runner", ["cuda", "mlx"])
def test_an_open_context_gives_choices_that_can_be_loaded(tmp_path: Path, runner: str) -> None:
    path = write(tmp_path, runner, Shape("qwen2"))
    command = load(runner, path, n_ctx="auto", slots=1)
    with start(runner) as program:
        found = choices(program, command)
        assert found[0].settings == {"n_ctx": 4096}
        assert found[-1].settings == {"n_ctx": 512}
        assert found[-1].host < found[0].host
        chosen = command.model_copy(update={"table": {**command.table, **found[-1].settings}})
        assert program.load(chosen).context_length == 512


@pytest.mark.parametrize("runner", ["cuda", "mlx"])
def test_a_table_with_auto_loads_without_an_estimate_too(tmp_path: Path, runner: str) -> None:
    path = write(tmp_path, runner, Shape("qwen2"))
    with start(runner) as program:
        assert program.load(load(runner, path, n_ctx="auto", slots=1)).context_length == 4096


def test_a_card_without_a_context_gets_a_long_one_that_takes_what_was_counted(tmp_path: Path) -> None:
    """The process is that of a model trained for more than a CPU gives by default."""
    shape = Shape("llama", layers=1, heads=2, kv_heads=1, head_dim=32, context_length=65536)
    command = load("cuda", write(tmp_path, "cuda", shape))
    with start("cuda") as program:
        choice = choices(program, command)[0]
        assert (choice.settings["n_ctx"], choice.settings["slots"]) == (32768, 4)
        capabilities = program.load(command)
        assert (capabilities.context_length, capabilities.slots) == (32768, 4)
    filled = command.model_copy(update={"table": {**command.table, **choice.settings}})
    compare(Case("cuda", filled, 32760))


@pytest.mark.parametrize("runner", ["cuda", "mlx"])
def test_what_cannot_be_loaded_fails_as_loading_would(tmp_path: Path, runner: str) -> None:
    for path, code in ((tmp_path / "absent", "model_not_found"), (tmp_path / "torn", "model_load_failed")):
        if code == "model_load_failed":
            (tmp_path / "torn").write_bytes(b"GGUF torn") if runner == "cuda" else (tmp_path / "torn").mkdir()
        with start(runner) as program:
            program.send(Estimate(load=load(runner, path)))
            program.until(lambda: program.failure is not None)
            assert isinstance(program.failure, Failed)
            assert program.failure.code == code
            assert str(path) in program.failure.message
            assert program.drain() == 1
