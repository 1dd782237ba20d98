"""How many threads compute a step: what is tried when, what is kept, and what never changes."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from exo.worker.protocol.commands import Load
from exo.worker.runner_cuda.bindings import Context
from exo.worker.runner_cuda.loading.loader import load
from exo.worker.runner_cuda.loading.threads import (
    CROWDED_WINDOWS,
    CpuWindow,
    ThreadCount,
    Threads,
    Trial,
    others_running,
    task_times,
)
from exo.worker.runner_cuda.prefix.state_file import be_nice
from tests.support.program import DEADLINE_SECONDS
from tests.support.tiny import Shape, write_gguf

ONE_ROW = (False, 1)
QUIET, CROWDED = CpuWindow(delay=0.01, idle=0.0), CpuWindow(delay=0.4, idle=0.0)
ONE_IDLE = CpuWindow(delay=0.0, idle=1.0)


def serve(threads: ThreadCount, window: CpuWindow, seconds: dict[int, float], steps: int, now: float) -> float:
    """Steps of which each count takes its own time, with a look at the machine after each; the time afterwards."""
    for _ in range(steps):
        used = threads.now()
        now += seconds[used]
        threads.computed(ONE_ROW, seconds[used], now)
        threads.look(window, now)
    return now


def test_a_quiet_machine_keeps_one_thread_for_each_core() -> None:
    threads = ThreadCount(4, 4)
    serve(threads, QUIET, {4: 0.02, 3: 0.01}, 100, 0.0)
    assert threads.now() == 4


@pytest.mark.parametrize(("fewer", "chosen"), [(0.05, 1), (0.06, 1), (0.09, 2)])
def test_where_threads_wait_for_cores_fewer_are_used_if_that_is_faster(fewer: float, chosen: int) -> None:
    threads = ThreadCount(2, 2)
    now = serve(threads, CROWDED, {2: 0.06, 1: fewer}, 60, 10.0)
    serve(threads, QUIET, {2: 0.06, 1: fewer}, 30, now)
    assert threads.now() == chosen


def test_all_cores_are_used_again_once_they_are_idle() -> None:
    threads = ThreadCount(2, 2)
    now = serve(threads, CROWDED, {2: 0.09, 1: 0.05}, 60, 10.0)
    assert threads.count == 1
    serve(threads, ONE_IDLE, {2: 0.03, 1: 0.05}, 60, now)
    assert threads.count == 2


def test_a_count_that_is_no_better_is_tried_ever_more_seldom() -> None:
    threads = ThreadCount(2, 2)
    tries, now = 0, 10.0
    for _ in range(3000):
        used = threads.now()
        tries += used == 1
        now += 0.03
        threads.computed(ONE_ROW, 0.06 if used == 1 else 0.03, now)
        threads.look(CROWDED, now)
    assert threads.count == 2
    assert tries < 30


@pytest.mark.parametrize(("usual", "steps"), [(0.01, 2), (0.4, 1)])
@pytest.mark.parametrize("other", [0.5, 2.0])
def test_a_trial_ends_early_where_the_difference_is_clear(usual: float, steps: int, other: float) -> None:
    trial = Trial(usual=2, other=1, began=0.0)
    tried = 0
    while trial.verdict(ONE_ROW) is None:
        tried += trial.count == 1
        trial.note(ONE_ROW, other * usual if trial.count == 1 else usual)
    assert trial.verdict(ONE_ROW) is (other < 1)
    assert tried == steps


def test_a_program_that_computes_for_a_moment_changes_nothing() -> None:
    threads = ThreadCount(2, 2)
    for step in range(20):
        threads.look(CROWDED if step % 2 else QUIET, 10.0 + step)
        assert threads.now() == 2


def test_a_long_prompt_uses_all_cores_soon_after_they_are_idle() -> None:
    threads = ThreadCount(2, 2)
    now = serve(threads, CROWDED, {2: 0.09, 1: 0.05}, 60, 10.0)
    serve(threads, ONE_IDLE, {2: 0.4, 1: 0.7}, 4, now + 10)
    assert threads.count == 2


def test_a_trial_ends_where_no_two_steps_are_alike() -> None:
    threads = ThreadCount(2, 2)
    for _ in range(CROWDED_WINDOWS):
        threads.look(CROWDED, 10.0)
    threads.computed((False, 0), 0.01, 10.0)
    assert threads.now() == 1
    for step in range(1000):
        threads.computed((False, step), 0.01, 10.0 + 0.01 * step)
    assert threads.now() == 2


@pytest.mark.parametrize(("free", "count"), [(2, 2), (1, 1), (-3, 1)])
def test_after_a_pause_the_cores_that_nobody_else_uses_are_used_at_once(free: int, count: int) -> None:
    threads = ThreadCount(2, 2)
    now = serve(threads, CROWDED, {2: 0.09, 1: 0.05}, 60, 10.0)
    assert threads.count == 1
    threads.begin_anew(free)
    assert threads.now() == count
    serve(threads, QUIET, {2: 0.03, 1: 0.05}, 60, now)
    assert threads.now() == count


def test_other_programs_that_compute_are_counted() -> None:
    script = "print(flush=True)\nimport time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for each in others:
            assert each.stdout is not None
            each.stdout.readline()
        assert others_running() is not None
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (others_running() or 0) < len(others):  # a container may keep some of them from its cores for a moment
            assert time.monotonic() < deadline
    finally:
        for each in others:
            each.kill()
            each.communicate()


def test_a_share_of_the_cores_is_kept_to_and_used_at_once_when_it_grows() -> None:
    threads = Threads(cores=4, hyperthreads=8)
    threads.restrict(1)
    assert threads.counts(exact=False) == (1, 1)
    threads.restrict(4)
    assert threads.counts(exact=False) == (4, 4)


def test_a_repeatable_request_has_the_same_count_whatever_else_runs() -> None:
    threads = Threads(cores=4, hyperthreads=4)
    threads.restrict(1)
    assert threads.counts(exact=True)[0] == 4


def test_the_model_cards_counts_stay() -> None:
    threads = Threads(cores=4, hyperthreads=4, fixed=(3, 2))
    threads.restrict(1)
    assert threads.counts(exact=False) == threads.counts(exact=True) == (3, 2)
    assert threads.use().reason == "the model card sets it"


def logits(context: Context, tokens: list[int]) -> bytes:
    batch, n_rows = context.batch, len(tokens)
    batch.tokens[:n_rows], batch.positions[:n_rows] = tokens, range(n_rows)
    batch.slots[:n_rows] = batch.outputs[:n_rows] = 0
    batch.outputs[n_rows - 1] = 1
    context.decode(n_rows)
    found = context.logits(1).tobytes()
    context.trim(0, 0)
    return found


def test_counts_change_no_results_of_several_rows(tmp_path: Path) -> None:
    write_gguf(tmp_path / "twin.gguf", Shape())
    table = {"path": str(tmp_path / "twin.gguf"), "slots": 2, "n_ctx": 256, "threads": 1}
    loaded = load(Load(model_id="test/twin", backend="LlamaCppCpu", table=table), lambda _: None)
    tokens = [*range(5, 45)]
    before = logits(loaded.context, tokens)
    for count in (2, 1, 2):
        loaded.context.use_threads(count, count)
        assert logits(loaded.context, tokens) == before
    loaded.free()


def test_threads_that_give_way_are_no_sign_of_a_crowded_machine() -> None:
    ready, done, ids = threading.Barrier(3), threading.Event(), dict[str, str]()

    def wait(name: str) -> None:
        ids[name] = str(threading.get_native_id())
        if name == "nice":
            be_nice()
        ready.wait()
        done.wait()

    waiting = [threading.Thread(target=wait, args=(name,)) for name in ("nice", "usual")]
    for each in waiting:
        each.start()
    ready.wait()
    seen = dict(task_times())
    done.set()
    for each in waiting:
        each.join()
    assert ids["usual"] in seen or not seen, "some kernels do not tell the times of threads"
    assert ids["nice"] not in seen
