"""``exact = true``: results do not depend on company, cuts or the prefix cache, to the last bit."""

from pathlib import Path

import pytest

from exo.config import Settings
from exo.worker.protocol.commands import Embed, Load, Text
from tests.support.program import Program, Result, ask, names, runner_command
from tests.support.tiny import Shape, write_gguf

name = names()
STREAMS = 16
PROMPTS = [f"Story {number}. " + "Once upon a time. " * (20 * number // STREAMS) for number in range(STREAMS - 1)]
PROMPTS.append("A king told a long story. " * 80)


def demo(**table: object) -> Load:
    file = Settings.load().models_directory / "google--gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
    assert file.exists(), "make demo-model fetches the demo model"
    whole = {"path": str(file), "slots": STREAMS, "n_ctx": 1024, "exact": True, **table}
    return Load.model_validate({"model_id": "demo", "backend": "LlamaCppCpu", "table": whole, "directories": ("/",)})


def generate(program: Program, *numbers: int) -> list[Result]:
    """The prompts' next tokens, all computed at the same time."""
    requests = [ask(next(name), PROMPTS[number], max_tokens=3) for number in numbers]
    return program.generate(*(request.model_copy(update={"logprobs": 5}) for request in requests))


def test_sixteen_streams_give_what_each_gives_alone() -> None:
    """The weights are Q4_K, Q5_0, Q6_K and Q8_0. A lone prompt is also computed after itself, from the prefix cache."""
    with Program(runner_command("exo.worker.runner_cuda")) as program:
        program.load(demo())
        together = generate(program, *range(STREAMS))
        for number in (0, 3, 9, STREAMS - 1):
            [alone] = generate(program, number)
            assert alone.tokens == together[number].tokens
            assert alone.logprobs == together[number].logprobs
        texts = [Embed(id=next(name), prompt=(Text(text="a short text"),)) for _ in range(10)]
        [lone] = program.generate(texts[0])
        assert {result.embedded.vector for result in program.generate(*texts[1:])} == {lone.embedded.vector}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({}, "every matrix must be quantised"),
        ({"cache_type_k": "f16", "cache_type_v": "f16"}, 'exact needs other cache types than "f16" for both'),
        ({"flash_attn": "off"}, 'exact needs flash_attn, which is "off"'),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, table: dict[str, str], reason: str) -> None:
    write_gguf(tmp_path / "float.gguf", Shape())
    with Program(runner_command("exo.worker.runner_cuda")) as program:
        program.send(demo(path=str(tmp_path / "float.gguf"), **table))
        program.drain()
        assert program.failure is not None
        assert program.failure.code == "model_misconfigured"
        assert reason in program.failure.message
