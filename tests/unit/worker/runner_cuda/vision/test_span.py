import pytest

from exo.worker.runner_common.pictures import Png
from exo.worker.runner_cuda.vision.span import SeenPicture, Span, position_of, span_at, whole_length
from tests.support.pictures import random_picture

PICTURE = SeenPicture(Png(1, random_picture(1)))


def span(start: int, stop: int, positions: int | None = None, *, whole: bool = False) -> Span:
    return Span(start, stop, PICTURE, 0, stop - start if positions is None else positions, whole)


@pytest.mark.parametrize(("index", "start"), [(0, 3), (3, 3), (6, 3), (7, 9), (9, 9), (11, 9), (12, None)])
def test_the_span_of_a_token_is_its_own_or_the_next_one(index: int, start: int | None) -> None:
    found = span_at([span(3, 7), span(9, 12)], index)
    assert (None if found is None else found.start) == start


@pytest.mark.parametrize("length", range(15))
def test_only_a_picture_that_is_computed_token_by_token_is_cut(length: int) -> None:
    spans = [span(3, 7), span(9, 12, whole=True)]
    assert whole_length(spans, length) == (9 if length in (10, 11) else length)
    assert whole_length([span(3, 7, 2)], length) == (3 if length in (4, 5, 6) else length)


def test_tokens_of_a_picture_may_share_positions() -> None:
    spans = [span(3, 7, 2), span(9, 12, 1)]
    assert [position_of(spans, index) for index in (0, 3, 7, 8, 9, 12, 20)] == [0, 3, 5, 6, 7, 8, 16]
