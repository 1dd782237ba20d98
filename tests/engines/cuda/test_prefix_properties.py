"""Whatever comes, goes and moves: the prefix cache hands out no wrong cell, and its tree finds every prefix."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo.worker.runner_common.sequence import Phase
from exo.worker.runner_cuda.prefix.cache import WORTH_SAVING
from exo.worker.runner_cuda.prefix.radix_tree import BLOCK, PrefixTree
from exo.worker.runner_cuda.sequence import Sequence
from tests.support.slots import Slots, prompt

TOKENS = st.lists(st.integers(0, 1), max_size=5 * BLOCK)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), TOKENS, st.booleans()), max_size=30), TOKENS)
def test_the_tree_finds_what_looking_at_everyone_finds(
    puts: list[tuple[int, list[int], bool]], query: list[int]
) -> None:
    tree: PrefixTree[int] = PrefixTree()
    held: dict[int, list[int]] = {}
    for holder, tokens, grows in puts:
        if not grows:
            tree.cut(holder, len(tokens))
            held[holder] = held.get(holder, [])[: len(tokens)]
        else:
            held[holder] = held.get(holder, []) + tokens
            tree.put(holder, held[holder])
    # A holder that was cut within a block holds the rest of it until it is put again.
    for holder, tokens in held.items():
        tree.put(holder, tokens)

    def shared(tokens: list[int]) -> int:
        same = next((i for i, (a, b) in enumerate(zip(tokens, query, strict=False)) if a != b), None)
        return (min(len(tokens), len(query)) if same is None else same) // BLOCK * BLOCK

    found = dict(tree.matches(query))
    assert list(found) == sorted(found, reverse=True)
    for depth in range(BLOCK, 6 * BLOCK, BLOCK):
        assert found.get(depth, frozenset()) == {holder for holder, tokens in held.items() if shared(tokens) >= depth}
    for holder in held:
        tree.cut(holder, 0)
    assert list(tree.matches(query)) == []


def family(members: list[tuple[int, int, int]]) -> list[list[int]]:
    """Prompts that share prefixes: a stem, cut, and then a tail of their own."""
    return [prompt(1000 * stem, length) + prompt(50_000 + 100 * tail, 1 + tail) for stem, length, tail in members]


MEMBERS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2 * WORTH_SAVING), st.integers(0, 30)), max_size=14)


@pytest.mark.parametrize(
    ("window", "cuts", "spare"), [(None, True, 0), (8, True, 0), (8, True, 100), (None, False, 0), (20, False, 0)]
)
@settings(max_examples=60)
@given(
    st.integers(1, 4),
    MEMBERS,
    st.lists(st.integers(0, 4), min_size=14, max_size=14),
    st.sets(st.integers(0, 13)),
    st.integers(0, 60_000),
)
def test_whatever_comes_and_goes_every_token_follows_the_cells_that_it_needs(
    window: int | None,
    cuts: bool,
    spare: int,
    n_slots: int,
    members: list[tuple[int, int, int]],
    pauses: list[int],
    spoilt: set[int],
    capacity: int,
) -> None:
    """Asserted by ``RecordedCells.decode`` in each step, also that cells of another adapter are not used."""
    slots = Slots(n_slots, capacity=capacity, window=window, cuts=cuts, spare=spare)
    running: list[Sequence] = []

    def go_on(wanted: int) -> None:
        """One step; those that have generated ``wanted`` tokens leave."""
        slots.step()
        assert slots.cache.n_bytes <= capacity
        for sequence in [each for each in running if len(each.tokens) - each.n_prompt >= wanted]:
            slots.scheduler.remove(sequence.id)
            running.remove(sequence)

    for at, (each, pause) in enumerate(zip(family(members), pauses, strict=False)):
        boundaries = tuple(range(each[-1] % 97, len(each), 97))
        running.append(slots.add(each, boundaries=boundaries, adapter=("", "x", "y")[pause % 3]))
        for _ in range(pause):
            go_on(pause)
        if at in spoilt:
            active = [sequence for sequence in running if sequence.phase is not Phase.WAITING]
            slots.spoil(*active[: 1 + at % 2])
            running = [sequence for sequence in running if sequence not in active[: 1 + at % 2]]
    for _ in range(300):
        if running:
            go_on(1)
    assert running == []


@settings(max_examples=60)
@given(MEMBERS, st.lists(st.integers(0, 4), min_size=14, max_size=14), st.integers(0, 60_000))
def test_whatever_moves_every_token_follows_the_tokens_of_its_prompt(
    members: list[tuple[int, int, int]], pauses: list[int], capacity: int
) -> None:
    """Asserted by ``RecordedCells.decode`` in each step. Each request leaves after some steps, finished or not."""
    slots = Slots(1, capacity=capacity, reuse=32)
    for (stem, length, line), pause in zip(members, pauses, strict=False):
        body = prompt(1000 * stem, length)
        sequence = slots.add(prompt(70_000, 20) + prompt(50_000 + 100 * line, 1 + line) + body)
        for _ in range(pause):
            slots.step()
        slots.scheduler.remove(sequence.id)
        assert slots.cells.aside == {}
