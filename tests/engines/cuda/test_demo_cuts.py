"""The demo model's runner: where a prompt is cut, beside streams or alone or in a burst, changes nothing."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.config import Settings
from exo.worker.protocol.commands import Load
from exo.worker.runner_cuda.prompt_cuts import MIN_CHUNK
from tests.support.program import Program, Result, ask, runner_command

PROMPT = " ".join(f"{number} squared is {number * number}." for number in range(40))


@contextmanager
def demo(**table: JsonValue) -> Generator[Program]:
    file = Settings.load().models_directory / "google--gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
    assert file.exists(), "make demo-model fetches the demo model"
    options = {"path": str(file), "n_ctx": 1024, **table}
    with Program(runner_command("exo.worker.runner_cuda")) as program:
        program.load(Load(model_id="demo", backend="LlamaCppCpu", table=options, directories=(str(Path.cwd()),)))
        yield program


def first_scores(beside: bool, chunk: int) -> tuple[list[int], Result]:
    """Where the prompt was cut, and what came of it."""
    with demo(slots=2, n_ubatch=chunk, max_itl_ms=1) as program:
        if beside:
            program.send(ask("stream", max_tokens=1000))
            program.until(lambda: "stream" in program.results and bool(program.results["stream"].tokens))
        [result] = program.generate(ask("x", PROMPT, max_tokens=1).model_copy(update={"logprobs": 20}))
        cuts = [progress.processed for progress in result.prefill]
        assert ("stream" in program.results and program.results["stream"].end is None) == beside
    return cuts, result


@pytest.mark.parametrize("chunk", [2 * MIN_CHUNK, 4 * MIN_CHUNK])
def test_a_prompt_beside_a_stream_is_cut_more_often_and_gives_the_same_to_the_last_bit(chunk: int) -> None:
    cuts, alone = first_scores(beside=False, chunk=chunk)
    more_cuts, beside = first_scores(beside=True, chunk=chunk)
    assert len(more_cuts) > len(cuts) > 1
    assert beside.tokens == alone.tokens
    assert beside.logprobs == alone.logprobs


def test_the_prompts_of_a_burst_give_the_same_to_the_last_bit_as_alone() -> None:
    requests = [
        ask(f"{number}", f"{number} " + " ".join(PROMPT.split()[: 32 + number % 3]), max_tokens=4).model_copy(
            update={"logprobs": 20, "cache_prompt": False}
        )
        for number in range(8)
    ]
    with demo(slots=8) as program:
        alone = [program.generate(request)[0] for request in requests]
        burst = program.generate(*(each.model_copy(update={"id": f"{each.id} again"}) for each in requests))
    assert [each.tokens[0] for each in burst] == [each.tokens[0] for each in alone]
    assert [each.logprobs[0] for each in burst] == [each.logprobs[0] for each in alone]
