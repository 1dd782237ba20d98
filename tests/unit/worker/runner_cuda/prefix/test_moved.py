from hypothesis import given
from hypothesis import strategies as st

from exo.worker.runner_cuda.prefix.moved import Move, in_order, moved

LEAST = 8
PART = st.integers(0, 20).map(lambda first: list(range(100 * first, 100 * first + 3 + 2 * first)))
TEXT = st.lists(PART, max_size=8).map(lambda parts: [token for part in parts for token in part])


def test_what_follows_a_changed_line_is_found_whole() -> None:
    head, old, new, body = list(range(30)), [500, 501], [600, 601, 602], list(range(1000, 1040))
    assert moved([*head, *old, *body], [*head, *new, *body, 7], 30, LEAST) == [Move(32, 33, 40)]


def test_a_part_of_just_enough_tokens_is_found_wherever_it_is() -> None:
    for at in range(2 * LEAST):
        gap = list(range(500, 500 + at))
        assert moved([*gap, *range(LEAST)], [9, *range(LEAST), 9], 0, LEAST) == [Move(at, 1, LEAST)]
        assert moved([*gap, *range(LEAST - 1)], [9, *range(LEAST - 1), 9], 0, LEAST) == []


@given(TEXT, TEXT, st.integers(0, 30))
def test_the_parts_are_in_both_texts_in_the_same_order(cached: list[int], prompt: list[int], start: int) -> None:
    found = moved(cached, prompt, start, LEAST)
    source = target = start
    for move in found:
        assert move.length >= LEAST
        assert (move.source >= source, move.target >= target) == (True, True)
        source, target = move.source + move.length, move.target + move.length
        assert cached[move.source : source] == prompt[move.target : target]


@given(TEXT, TEXT)
def test_moves_in_order_overwrite_nothing_that_is_still_to_be_moved(cached: list[int], prompt: list[int]) -> None:
    """Cells are moved as llama.cpp does it: every cell with a position in a range, whichever text it comes from."""
    found = moved(cached, prompt, 0, LEAST)
    cells = [[at, cached[at]] for move in found for at in range(move.source, move.source + move.length)]
    for move in in_order(found):
        for cell in cells:
            if move.source <= cell[0] < move.source + move.length:
                cell[0] += move.shift
    expected = {at: prompt[at] for move in found for at in range(move.target, move.target + move.length)}
    assert {cell[0]: cell[1] for cell in cells} == expected
