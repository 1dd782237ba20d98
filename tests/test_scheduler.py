from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo.worker.messages import SamplingParams
from exo.worker.runner_cuda.sampler import Sampler
from exo.worker.runner_cuda.scheduler import Scheduler, Step
from exo.worker.runner_cuda.sequence import Phase, Sequence


def sequence(name: str, prompt: list[int], n_limit: int = 10_000) -> Sequence:
    return Sequence(name, list(prompt), len(prompt), n_limit, Sampler(SamplingParams(seed=0)))


def scheduler(n_slots: int = 2, budget: int = 8, chunk: int = 4) -> Scheduler:
    return Scheduler(n_slots, budget, chunk, lambda slot, length: True)


def advance(target: Scheduler, token: int = 1) -> Step:
    """One step as the engine makes it: everything planned is computed and every due row gets ``token``."""
    step = target.plan()
    for due in target.computed(step):
        due.tokens.append(token)
    return step


def rows(step: Step) -> dict[str, tuple[int, int]]:
    return {chunk.sequence.id: (chunk.start, chunk.stop) for chunk in step.chunks}


def test_decoding_sequences_are_in_every_step_while_a_long_prompt_is_prefilled() -> None:
    target = scheduler()
    target.add(sequence("short", [1, 2]))
    advance(target)
    target.add(sequence("long", list(range(20))))
    for start in range(0, 20, 4):
        planned = rows(advance(target))
        assert planned["long"] == (start, start + 4)
        assert planned["short"][1] - planned["short"][0] == 1
    assert rows(advance(target))["long"] == (20, 21)


def test_waiting_prompts_take_turns() -> None:
    target = scheduler(n_slots=3, budget=4, chunk=4)
    for name in "abc":
        target.add(sequence(name, [ord(name), *range(11)]))
    order = [next(iter(rows(advance(target)))) for _ in range(6)]
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_how_a_prompt_is_cut_does_not_depend_on_the_others() -> None:
    alone, crowded = scheduler(n_slots=4, budget=8), scheduler(n_slots=4, budget=8)
    for target in (alone, crowded):
        target.add(sequence("x", list(range(18))))
    for name in "pqr":
        crowded.add(sequence(name, [ord(name), *range(6)]))

    def cuts(target: Scheduler) -> list[tuple[int, int]]:
        steps = (rows(advance(target)) for _ in range(12))
        return [step["x"] for step in steps if "x" in step and step["x"][0] < 18]

    assert cuts(alone) == cuts(crowded) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 18)]


def test_requests_beyond_the_slots_wait_in_order() -> None:
    target = scheduler(n_slots=1)
    for name in ("first", "second", "third"):
        target.add(sequence(name, [1]))
    assert set(rows(advance(target))) == {"first"}
    target.remove("first")
    assert set(rows(advance(target))) == {"second"}
    target.remove("second")
    assert set(rows(advance(target))) == {"third"}


def test_a_prefix_that_a_free_slot_holds_is_not_computed_again_but_the_last_token_is() -> None:
    prompt = list(range(100, 120))
    target = scheduler(n_slots=2, budget=32, chunk=32)
    target.add(sequence("blocker", [1]))
    target.add(sequence("one", prompt))
    advance(target)
    target.remove("one")
    target.remove("blocker")
    target.add(sequence("same", prompt))
    step = advance(target)
    assert step.started == [("same", 19)]
    assert rows(step)["same"] == (19, 20)


def test_a_prefix_too_short_to_matter_does_not_draw_a_request_from_the_lowest_slot() -> None:
    target = scheduler(n_slots=2, budget=32, chunk=32)
    target.add(sequence("blocker", [1]))
    target.add(sequence("one", [2, 3, 4]))
    advance(target)
    target.remove("one")
    target.remove("blocker")
    target.add(sequence("like one", [2, 3, 5]))
    assert [chunk.sequence.slot for chunk in advance(target).chunks] == [0]


def test_a_cache_that_cannot_be_cut_is_emptied() -> None:
    cuts: list[int] = []

    def trim(slot: int, length: int) -> bool:
        cuts.append(length)
        return length == 0

    target = Scheduler(1, 32, 32, trim)
    target.add(sequence("one", [5, 6, 7]))
    advance(target)
    target.remove("one")
    target.add(sequence("two", [5, 6, 9]))
    assert rows(advance(target))["two"] == (0, 3)
    assert cuts[-2:] == [2, 0]


def test_removing_frees_the_slot_at_every_phase_and_only_once() -> None:
    target = scheduler(n_slots=1)
    waiting, running = sequence("waiting", [1]), sequence("running", list(range(20)))
    target.add(running)
    advance(target)
    target.add(waiting)
    assert target.remove("waiting") is waiting
    assert target.remove("running") is running
    assert target.remove("running") is None
    assert not target
    assert target.slots[0].sequence is None


def test_only_legal_transitions() -> None:
    done = sequence("x", [1])
    done.move(Phase.DONE)
    with pytest.raises(ValueError, match="cannot go from done to decode"):
        done.move(Phase.DECODE)


def names() -> Iterator[str]:
    return (f"s{number}" for number in range(10**6))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([(4, 4), (8, 4), (16, 16), (7, 3)]),
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 4)),
        max_size=12,
    ),
)
def test_cells_always_match_tokens(
    n_slots: int, sizes: tuple[int, int], arrivals: list[tuple[list[int], int, int]]
) -> None:
    """Whatever arrives, leaves and is reused: what llama.cpp's cells hold is what each sequence believes they hold."""
    cells: list[list[int]] = [[] for _ in range(n_slots)]

    def trim(slot: int, length: int) -> bool:
        del cells[slot][length:]
        return True

    target = Scheduler(n_slots, *sizes, trim)
    name = names()
    for prompt, wanted, pause in [*arrivals, ([0], 1, 40)]:
        target.add(sequence(next(name), prompt, len(prompt) + wanted))
        for _ in range(pause):
            step = target.plan()
            assert [c.sequence.slot for c in step.chunks] == sorted({c.sequence.slot for c in step.chunks})
            prefill = [c for c in step.chunks if c.stop <= c.sequence.n_prefill]
            assert sum(c.stop - c.start for c in prefill) <= sizes[0]
            for chunk in step.chunks:
                held = cells[chunk.sequence.slot]
                assert held == chunk.sequence.tokens[: chunk.start]
                held += chunk.sequence.tokens[chunk.start : chunk.stop]
            for due in target.computed(step):
                due.tokens.append(len(due.tokens) % 3)
                if len(due.tokens) >= due.n_limit:
                    target.remove(due.id)
    assert all(slot.cached == held for slot, held in zip(target.slots, cells, strict=True))
