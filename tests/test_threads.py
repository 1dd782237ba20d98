"""The choice of thread counts, and what depends on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from exo.worker.messages import Load
from exo.worker.runner_cuda.llama import Context
from exo.worker.runner_cuda.loading import load
from exo.worker.runner_cuda.threads import WORTH_LAST_CORE, choose, settle
from tests.tiny import Shape, write_gguf


def taking(seconds: dict[int, float], asked: list[int]) -> Callable[[int], float]:
    def of(threads: int) -> float:
        asked.append(threads)
        return seconds[threads]

    return of


@pytest.mark.parametrize(("few_take", "chosen"), [(2.0, 2), (1.04, 2), (1.02, 1), (0.5, 1)])
def test_more_threads_are_used_where_they_are_worth_it(few_take: float, chosen: int) -> None:
    assert choose(1, 2, WORTH_LAST_CORE, taking({1: few_take, 2: 1.0}, [])) == chosen


def test_both_are_tried_in_turn_and_the_median_counts() -> None:
    asked: list[int] = []
    hiccups = iter([9.0, 1.0, 9.0, 1.0, 1.0, 1.0, 9.0])

    def seconds(threads: int) -> float:
        asked.append(threads)
        return next(hiccups) if threads == 1 else 1.0

    assert choose(1, 2, WORTH_LAST_CORE, seconds) == 1
    assert asked == [1, 2] * 7


@pytest.mark.parametrize(("few", "many", "chosen"), [(0, 1, 1), (63, 64, 63), (8, 8, 8), (34, 35, 34)])
def test_nothing_is_tried_where_there_is_nothing_to_find_out(few: int, many: int, chosen: int) -> None:
    asked: list[int] = []
    assert choose(few, many, WORTH_LAST_CORE, taking({}, asked)) == chosen
    assert asked == []


def logits(context: Context, tokens: list[int]) -> bytes:
    batch, n_rows = context.batch, len(tokens)
    batch.tokens[:n_rows], batch.positions[:n_rows] = tokens, range(n_rows)
    batch.slots[:n_rows] = batch.outputs[:n_rows] = 0
    batch.outputs[n_rows - 1] = 1
    context.decode(n_rows)
    found = context.logits(1).tobytes()
    context.trim(0, 0)
    return found


def test_finding_out_leaves_no_trace_and_counts_change_no_results(tmp_path: Path) -> None:
    write_gguf(tmp_path / "twin.gguf", Shape())
    table = {"path": str(tmp_path / "twin.gguf"), "slots": 2, "n_ctx": 256, "threads": 1}
    loaded = load(Load(model_id="test/twin", backend="LlamaCppCpu", table=table), lambda _: None)
    context = loaded.context
    tokens = [*range(5, 45)]
    before = logits(context, tokens)
    one, several = settle(context, 2, 2)
    assert one in (1, 2)
    assert several == 2
    assert logits(context, tokens) == before
    loaded.free()
