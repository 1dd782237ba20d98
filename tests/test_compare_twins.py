"""The project's proof: llama.cpp and MLX say the same, given the same float32 weights and nothing that rounds them."""

from pathlib import Path

import pytest

from exo.compare.engine import Engine
from exo.compare.run import Options, Subject, examine
from exo.worker.host import Host
from exo.worker.instances import runner_commands
from exo.worker.messages import Load
from tests.conftest import fake_card
from tests.tiny import Shape, write_gguf, write_mlx
from tests.tiny.shape import ARCHITECTURES, Architecture

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
    """Seeded texts are compared token against token, though each goes its own way after a single difference."""
    write_gguf(tmp_path / "twin.gguf", Shape(architecture))
    write_mlx(tmp_path / "twin", Shape(architecture))
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "threads": 1}
    commands = runner_commands()
    llama_cpp = Load(model_id="t", backend="LlamaCppCpu", table={"path": str(tmp_path / "twin.gguf"), **exact})
    mlx = Load(model_id="t", backend="MlxCpu", table={"path": str(tmp_path / "twin")})
    engines = Engine("cuda", commands["cuda"], llama_cpp), Engine("mlx", commands["mlx"], mlx)
    options = Options(PROMPTS, TOKENS)
    found = await examine(Subject(fake_card(), HOST), engines, options, tmp_path / "log", lambda _: None)
    (pair,) = found.pairs
    assert pair.tokenisation == ()
    assert pair.divergence.vocabulary == 320
    assert pair.divergence.max_abs <= 1e-3
    assert pair.divergence.top1_agreement == 1
    assert pair.greedy.identical == pair.greedy.sequences == len(PROMPTS) == 20
    assert pair.seeded.tokens == 20 * TOKENS
    assert pair.seeded.equal >= 0.99 * pair.seeded.tokens
    assert all(difference.margin < 1e-4 for difference in pair.seeded.differences)
