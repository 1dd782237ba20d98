"""The demo model's runner: where a prompt is cut, beside streams or alone, changes nothing."""

from pathlib import Path

import pytest

from exo.config import Settings
from exo.worker.protocol.commands import Load
from exo.worker.runner_cuda.prompt_cuts import MIN_CHUNK
from tests.support.program import Program, Result, ask, runner_command

PROMPT = " ".join(f"{number} squared is {number * number}." for number in range(40))


def first_scores(beside: bool, chunk: int) -> tuple[list[int], Result]:
    """Where the prompt was cut, and what came of it."""
    file = Settings.load().models_directory / "google--gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
    assert file.exists(), "make demo-model fetches the demo model"
    table = {"path": str(file), "slots": 2, "n_ctx": 1024, "n_ubatch": chunk, "max_itl_ms": 1}
    with Program(runner_command("exo.worker.runner_cuda")) as program:
        program.load(Load(model_id="demo", backend="LlamaCppCpu", table=table, directories=(str(Path.cwd()),)))
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
