"""The project's proof: all engines say the same, given the same float32 weights and nothing that rounds them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from exo.compare.comparison import Comparison
from exo.compare.engine import ComparedEngine
from exo.compare.run import CompareOptions, Subject, examine
from exo.worker.host import Host
from exo.worker.protocol.commands import Load
from exo.worker.protocol.runners import runner_commands
from tests.conftest import fake_card, needs_vllm
from tests.support.tiny import Shape, write_gguf, write_mlx
from tests.support.tiny.shape import ARCHITECTURES, Architecture
from tests.support.twins import FLOAT32

OPENINGS = (
    " the stopper and a hello world",
    " you and the user",
    "Once upon a time",
    "def hello(world):",
    "1, 2, 3, 4,",
)
ENDINGS = (" stop", " and another system", " — naïve", "\n")
PROMPTS = tuple(f"{opening}{ending}" for opening in OPENINGS for ending in ENDINGS)
TOKENS = 64
HOST = Host(system="", machine="", cpu_count=1, memory_total=1, memory_available=1, nvidia_devices=(), probes={})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_both_engines_say_the_same(architecture: Architecture, tmp_path: Path) -> None:
    agree(await compared(Shape(architecture), ("cuda", "mlx"), tmp_path), PROMPTS)


@needs_vllm
async def test_all_three_engines_say_the_same(tmp_path: Path) -> None:
    """With heads of 64 numbers, the smallest that vLLM has attention for."""
    found = await compared(Shape(head_dim=64), ("cuda", "mlx", "vllm"), tmp_path, PROMPTS[::2])
    assert [(pair.reference, pair.other) for pair in found.pairs] == [("cuda", "mlx"), ("cuda", "vllm")]
    agree(found, PROMPTS[::2])


async def compared(shape: Shape, names: Sequence[str], folder: Path, prompts: Sequence[str] = PROMPTS) -> Comparison:
    write_gguf(folder / "twin.gguf", shape)
    write_mlx(folder / "twin", shape)
    twin = str(folder / "twin")
    loads = {
        "cuda": Load(model_id="t", backend="LlamaCppCpu", table={"path": f"{twin}.gguf", **FLOAT32}),
        "mlx": Load(model_id="t", backend="MlxCpu", table={"path": twin}),
        "vllm": Load(model_id="t", backend="Vllm", table={"path": twin, "dtype": "float32", "threads": 1}),
    }
    commands = runner_commands()
    engines = [ComparedEngine(name, commands[name], loads[name]) for name in names]
    options = CompareOptions(tuple(prompts), TOKENS)
    return await examine(Subject(fake_card(), HOST), engines, options, folder / "log", lambda _: None)


def agree(found: Comparison, prompts: Sequence[str]) -> None:
    """Seeded texts are compared token against token, though each goes its own way after a single difference."""
    for pair in found.pairs:
        assert pair.tokenisation == ()
        assert pair.divergence.vocabulary == 320
        assert pair.divergence.max_abs <= 1e-3
        assert pair.divergence.top1_agreement == 1
        assert pair.greedy.identical == pair.greedy.sequences == len(prompts)
        assert pair.seeded.tokens == len(prompts) * TOKENS
        assert pair.seeded.equal >= 0.99 * pair.seeded.tokens
        assert all(difference.margin < 1e-4 for difference in pair.seeded.differences)
