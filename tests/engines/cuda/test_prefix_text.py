"""Text that follows a prefix from the cache, from llama.cpp itself."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from tests.support.program import Program, ask
from tests.support.rpc_devices import llama_command
from tests.support.tiny import Shape, write_gguf
from tests.support.twins import FLOAT32


@pytest.fixture(params=["llama", "gemma3", "gemma3 on devices"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Load]:
    """A tiny float32 model, also one with a sliding window, and a context that rounds as little as llama.cpp can."""
    architecture, _, on_devices = request.param.partition(" ")
    backend = "LlamaCppCuda" if on_devices else "LlamaCppCpu"
    write_gguf(tmp_path / "tiny.gguf", Shape(architecture))
    table = {**FLOAT32, "n_ctx": 2048}

    def load(**more: JsonValue) -> Load:
        path = str(tmp_path / "tiny.gguf")
        return Load(model_id="test/tiny", backend=backend, table={"path": path, **table, **more})

    return load


def start(command: Load) -> Program:
    program = Program(llama_command(command.backend))
    program.load(command)
    return program


def words(seed: int, length: int) -> list[int]:
    return [97 + (seed + index) * (index + 7) % 23 for index in range(length)]


def generated(program: Program, *prompts: list[int], n_cached: list[int] | None = None) -> list[list[int]]:
    """What follows each prompt when they come together, greedy and sampled by turns."""
    requests = [
        ask(f"r{os.urandom(6).hex()}", each, max_tokens=24, temperature=index % 2, seed=index)
        for index, each in enumerate(prompts)
    ]
    results = program.generate(*requests)
    if n_cached is not None:
        assert [result.finished.usage.cached_tokens for result in results] == n_cached
    return [result.tokens for result in results]


def test_text_is_the_same_with_and_without_a_prefix_taken_from_a_busy_slot(load: Callable[..., Load]) -> None:
    stem = words(1, 400)
    prompts = [stem + words(seed, 20 + seed) for seed in (2, 3, 4)]
    with start(load(slots=1, prefix_cache_bytes=0)) as program:
        expected: list[list[int]] = []
        for each in prompts:
            expected += generated(program, each, n_cached=[0])
            generated(program, words(50, 30), n_cached=[0])
    with start(load(slots=4)) as program:
        program.send(ask("running", [*stem, 5], max_tokens=1500))
        program.until(lambda: "running" in program.results and len(program.results["running"].tokens) > 2)
        for each, alone in zip(prompts, expected, strict=True):
            assert generated(program, each, n_cached=[400]) == [alone]
        assert program.results["running"].end is None


def test_text_is_the_same_with_and_without_a_prefix_that_was_in_the_hosts_memory(load: Callable[..., Load]) -> None:
    with start(load(slots=1)) as program:
        first, other = words(1, 500), words(2, 600)
        (answer,) = generated(program, first, n_cached=[0])
        generated(program, other, n_cached=[0])
        conversation = first + answer + words(3, 30)
        (restored,) = generated(program, conversation, n_cached=[len(first + answer) - 1])
    with start(load(slots=1, prefix_cache_bytes=0)) as program:
        assert generated(program, conversation, n_cached=[0]) == [restored]
