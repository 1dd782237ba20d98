"""The judgements of the fault bench: what it calls lost, doubled, changed and a near-tie."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.campaign import plan
from bench.texts import Alignment, NearTie, align, gap_and_noise

TEXT = random.Random(0).choices(range(320), k=400)


def test_equal_texts_have_no_difference() -> None:
    assert align(TEXT, tuple(TEXT)).identical


@given(at=st.integers(0, 399), count=st.integers(1, 20))
def test_tokens_left_out_are_lost_wherever_they_are(at: int, count: int) -> None:
    got = TEXT[:at] + TEXT[at + count :]
    assert align(TEXT, got) == Alignment(lost=len(TEXT) - len(got))


@given(at=st.integers(1, 400), count=st.integers(1, 20))
def test_tokens_that_come_again_are_doubled(at: int, count: int) -> None:
    again = TEXT[max(0, at - count) : at]
    assert align(TEXT, TEXT[:at] + again + TEXT[at:]) == Alignment(doubled=len(again))


def test_losses_and_doublings_add_up() -> None:
    got = TEXT[:50] + TEXT[53:200] + TEXT[198:390]
    assert align(TEXT, got) == Alignment(lost=3 + 10, doubled=2)


def test_another_continuation_is_neither() -> None:
    rest = random.Random(1).choices(range(320), k=300)
    assert align(TEXT, TEXT[:100] + rest) == Alignment(changed_at=100)


@pytest.mark.parametrize(("gap", "within"), [(0.3, True), (0.7, False)])
def test_a_gap_is_a_near_tie_up_to_what_chunkings_move_anywhere_in_the_text(gap: float, within: bool) -> None:
    differences = np.array([[4.0, -gap, 2.0], [4.1, -gap + 0.01, 1.5], [3.9, -gap, 2.0]])
    found = gap_and_noise(differences, 1)
    assert found == pytest.approx((gap, 0.5, 0.01))
    of_text = {"gap": found[0], "noise": found[1], "noise_here": found[2]}
    tie = NearTie(stream=0, position=1, expected=5, got=6, by="undisturbed run", **of_text)
    assert tie.within_noise is within


def test_a_plan_is_that_of_its_seed_and_kills_early_now_and_then_but_never_twice_in_a_row() -> None:
    kinds = plan(200, 5, 5, random.Random(3))
    assert kinds == plan(200, 5, 5, random.Random(3)) != plan(200, 5, 5, random.Random(4))
    assert kinds.count("kill") + kinds.count("early kill") == 200
    assert (kinds.count("stop"), kinds.count("flood")) == (5, 5)
    early = [at for at, kind in enumerate(kinds) if kind == "early kill"]
    assert early
    assert all(kinds[at - 1] == "kill" for at in early)
