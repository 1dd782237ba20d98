"""The MLX runner's scheduler, which plans a step before the tokens of the one before are known."""

from collections.abc import Sequence as Tokens

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo.worker.protocol.commands import SamplingParams
from exo.worker.runner_common.sequence import Phase
from exo.worker.runner_mlx.scheduler import MlxScheduler, MlxStep
from exo.worker.runner_mlx.sequence import MlxSequence


def sequence(
    name: str, prompt: Tokens[int], n_limit: int = 10_000, *, prompt_logprobs: int | None = None
) -> MlxSequence:
    params = SamplingParams(seed=0)
    return MlxSequence(name, list(prompt), len(prompt), n_limit, params, prompt_logprobs=prompt_logprobs)


def finish(target: MlxScheduler, step: MlxStep, token: int = 1) -> None:
    """What the engine does with a step's tokens, once it has them."""
    for row in step.rows:
        if row.sequence.phase is not Phase.DONE:
            row.sequence.tokens.append(token)
            if len(row.sequence.tokens) >= row.sequence.n_limit:
                target.remove(row.sequence.id)


def advance(target: MlxScheduler) -> MlxStep:
    step = target.plan()
    finish(target, step)
    return step


def chunks(step: MlxStep) -> dict[str, tuple[int, int]]:
    return {chunk.sequence.id: (chunk.start, chunk.stop) for chunk in step.chunks}


def rows(step: MlxStep) -> dict[str, int]:
    return {row.sequence.id: row.position for row in step.rows}


def test_a_prompt_s_last_token_is_its_first_row_in_the_step_of_its_last_chunk() -> None:
    target = MlxScheduler(1, 4)
    target.add(sequence("x", range(7)))
    first, second, third = advance(target), advance(target), advance(target)
    assert (chunks(first), rows(first)) == ({"x": (0, 4)}, {})
    assert (chunks(second), rows(second)) == ({"x": (4, 6)}, {"x": 6})
    assert (chunks(third), rows(third)) == ({}, {"x": 7})
    assert [step.processed() for step in (first, second, third)] == [[("x", 4)], [("x", 7)], []]


def test_decoding_sequences_are_in_every_step_while_a_long_prompt_is_prefilled() -> None:
    target = MlxScheduler(2, 4)
    target.add(sequence("short", [1, 2]))
    advance(target)
    target.add(sequence("long", range(21)))
    for start in range(0, 20, 4):
        step = advance(target)
        assert chunks(step) == {"long": (start, start + 4)}
        assert "short" in rows(step)
    assert rows(advance(target)).keys() == {"short", "long"}


def test_waiting_prompts_take_turns() -> None:
    target = MlxScheduler(3, 4)
    for name in "abc":
        target.add(sequence(name, [ord(name), *range(11)]))
    assert [next(iter(chunks(advance(target)))) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_how_a_prompt_is_cut_does_not_depend_on_the_others() -> None:
    alone, crowded = MlxScheduler(4, 8), MlxScheduler(4, 8)
    for target in (alone, crowded):
        target.add(sequence("x", range(19)))
    for name in "pqr":
        crowded.add(sequence(name, [ord(name), *range(6)]))

    def cuts(target: MlxScheduler) -> list[tuple[int, int]]:
        return [step["x"] for step in (chunks(advance(target)) for _ in range(12)) if "x" in step]

    assert cuts(alone) == cuts(crowded) == [(0, 8), (8, 16), (16, 18)]


def test_short_prompts_share_a_step() -> None:
    target = MlxScheduler(3, 8)
    for name in "abc":
        target.add(sequence(name, [ord(name), 1, 2]))
    step = advance(target)
    assert chunks(step) == {"a": (0, 2), "b": (0, 2), "c": (0, 2)}
    assert rows(step) == {"a": 2, "b": 2, "c": 2}


def test_no_row_is_planned_for_a_token_beyond_the_limit() -> None:
    target = MlxScheduler(1, 8)
    target.add(sequence("x", [1, 2], n_limit=4))
    first, second, third = target.plan(), target.plan(), target.plan()
    assert (rows(first), rows(second), rows(third)) == ({"x": 1}, {"x": 2}, {})


def test_a_sequence_that_is_to_generate_nothing_has_one_row() -> None:
    target = MlxScheduler(1, 4)
    target.add(sequence("x", range(6), n_limit=6))
    first, second, third = target.plan(), target.plan(), target.plan()
    assert (chunks(first), chunks(second)) == ({"x": (0, 4)}, {"x": (4, 5)})
    assert (rows(second), rows(third)) == ({"x": 5}, {})
    assert second.processed() == [("x", 6)]


def test_a_prompt_whose_log_probabilities_are_asked_for_reuses_nothing_and_spares_the_slots_that_could() -> None:
    prompt = range(100, 140)
    target = MlxScheduler(2, 64)
    for name in ("other", "one"):
        target.add(sequence(name, prompt if name == "one" else [1]))
    advance(target)
    target.remove("one")
    target.remove("other")
    target.add(sequence("scored", prompt, prompt_logprobs=0))
    target.add(sequence("same", prompt))
    step = target.plan()
    assert step.started == [("scored", 0), ("same", 39)]
    assert chunks(step) == {"scored": (0, 39)}


def test_an_exact_prefix_hit_goes_straight_to_decoding() -> None:
    prompt = range(100, 120)
    target = MlxScheduler(2, 32)
    target.add(sequence("blocker", [1]))
    target.add(sequence("one", prompt))
    advance(target)
    target.remove("one")
    target.remove("blocker")
    target.add(sequence("same", prompt))
    step = target.plan()
    assert step.started == [("same", 19)]
    assert (chunks(step), rows(step)) == ({}, {"same": 19})


def test_a_prefix_too_short_to_matter_does_not_draw_a_request_from_the_lowest_slot() -> None:
    target = MlxScheduler(2, 32)
    target.add(sequence("blocker", [1]))
    target.add(sequence("one", [2, 3, 4]))
    advance(target)
    target.remove("one")
    target.remove("blocker")
    target.add(sequence("like one", [2, 3, 5]))
    assert [row.sequence.slot for row in target.plan().rows] == [0]


def test_cells_that_are_not_to_be_trusted_are_not_reused() -> None:
    target = MlxScheduler(1, 32)
    target.add(sequence("failing", range(30)))
    target.plan()
    target.remove("failing", reusable=False)
    target.add(sequence("next", range(30)))
    step = target.plan()
    assert step.started == [("next", 0)]
    assert [(stale.start, stale.stop) for stale in step.stale] == [(0, 30)]


def test_removing_frees_the_slot_at_every_phase_and_only_once() -> None:
    target = MlxScheduler(1, 4)
    waiting, running = sequence("waiting", [1]), sequence("running", range(20))
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


@settings(max_examples=200)
@given(
    st.integers(1, 4),
    st.sampled_from([3, 4, 16]),
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 4), st.booleans()
        ),
        max_size=12,
    ),
)
def test_cells_always_match_tokens(n_slots: int, chunk: int, arrivals: list[tuple[list[int], int, int, bool]]) -> None:
    """Whatever arrives, leaves and is reused: what the cache holds is what each sequence believes it holds, nothing
    stale lies beyond it, and the device, which runs one step behind the plan, never lacks a token.
    """
    cells: list[list[int]] = [[] for _ in range(n_slots)]
    target = MlxScheduler(n_slots, chunk)

    def run(step: MlxStep) -> None:
        for stale in step.stale:
            assert len(cells[stale.slot]) == stale.stop
            del cells[stale.slot][stale.start :]
        for part in step.chunks:
            held = cells[part.sequence.slot]
            assert held == part.sequence.tokens[: part.start]
            held += part.sequence.tokens[part.start : part.stop]
        assert sum(part.stop - part.start for part in step.chunks) <= chunk
        slots = [row.sequence.slot for row in step.rows]
        assert slots == sorted(set(slots))
        for row in step.rows:
            held = cells[row.sequence.slot]
            assert len(held) == row.position
            # The token that follows is a function of those before it, so the device knows it before the host does.
            known = row.sequence.tokens
            held.append(known[row.position] if row.position < len(known) else follower(held))

    def follower(held: list[int]) -> int:
        return (len(held) + sum(held)) % 3

    def tokens_of(step: MlxStep) -> None:
        for row in step.rows:
            if row.sequence.phase is not Phase.DONE:
                known = cells[row.sequence.slot][: row.position + 1]
                row.sequence.tokens.append(follower(known))
                if len(row.sequence.tokens) >= row.sequence.n_limit or row.sequence.tokens[-3:] == [2, 2, 2]:
                    target.remove(row.sequence.id)

    before: MlxStep | None = None
    for index, (prompt, wanted, pause, cancelled) in enumerate([*arrivals, ([0], 1, 60, False)]):
        target.add(sequence(str(index), prompt, len(prompt) + wanted))
        for _ in range(pause):
            step = target.plan()
            run(step)
            if before is not None:
                tokens_of(before)
            before = step
        if cancelled:
            target.remove(str(index))
    assert not target
    for slot, held in zip(target.slots, cells, strict=True):
        assert slot.n_written == len(held)
        assert slot.cached == held[: len(slot.cached)]
