"""What the figures of a benchmark mean, on outcomes made up for it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo.bench.load import arrivals
from exo.bench.options import Objective
from exo.bench.reading import Fault, Outcome
from exo.bench.report import LoadResult
from exo.bench.statistics import distribution, gaps_before, gaps_during, is_good, long_prompt, percentile, summarize

LOAD = LoadResult(concurrency=2, rate=None)


def outcome(began: float, *times: float, tokens: int | None = None, fault: str = "", cut: bool = False) -> Outcome:
    return Outcome(
        began=began,
        ended=times[-1] if times else began,
        times=times,
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=len(times) if tokens is None else tokens,
        counted_by="usage",
        fault=Fault(fault, "why") if fault else None,
        cut=cut,
    )


def test_percentiles_of_known_numbers() -> None:
    numbers = [float(number) for number in range(1, 102)]
    assert [percentile(numbers, share) for share in (0, 0.5, 0.9, 0.99, 1)] == [1, 51, 91, 100, 101]
    assert percentile([1.0, 2.0], 0.25) == 1.25
    assert percentile([7.0], 0.99) == 7.0


@given(st.lists(st.floats(0, 1000), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_percentiles_rise_and_stay_inside(numbers: list[float], one: float, other: float) -> None:
    ordered = sorted(numbers)
    low, high = (percentile(ordered, share) for share in sorted((one, other)))
    assert ordered[0] <= low + 1e-9
    assert low <= high + 1e-9
    assert high <= ordered[-1] + 1e-9


def test_distributions_are_in_milliseconds_whatever_the_order() -> None:
    seconds = [number / 1000 for number in range(1, 102)]
    random.Random(1).shuffle(seconds)
    found = distribution(seconds)
    assert found is not None
    assert (found.count, found.min, found.max) == (101, 1, 101)
    assert found.p90 == pytest.approx(91)
    assert found.mean == pytest.approx(51)
    assert distribution([]) is None


def test_a_stage_counts_tokens_and_time_of_whole_requests() -> None:
    stage = summarize(
        LOAD,
        [
            outcome(10.0, 11.0, 12.0, 14.0),
            outcome(10.5, 12.5, 13.0, tokens=5),
            outcome(11.0, 11.1, fault="http_429"),
            outcome(11.0, 99.0, cut=True),
        ],
        None,
    )
    assert (stage.requests.sent, stage.requests.whole, stage.requests.cut) == (4, 2, 1)
    assert stage.requests.errors == {"http_429": 1}
    assert stage.requests.messages == {"http_429": "why"}
    assert (stage.tokens.prompt, stage.tokens.cached, stage.tokens.output) == (20, 8, 8)
    assert stage.seconds == pytest.approx(4.0)
    assert stage.output_tokens_per_second == pytest.approx(2.0)
    assert stage.total_tokens_per_second == pytest.approx(7.0)
    assert stage.requests_per_second == pytest.approx(0.5)
    assert stage.ttft is not None
    assert (stage.ttft.min, stage.ttft.max) == pytest.approx((1000, 2000))
    assert stage.itl is not None
    assert (stage.itl.count, stage.itl.max) == (3, pytest.approx(2000))
    assert stage.tpot is not None
    assert sorted((stage.tpot.min, stage.tpot.max)) == pytest.approx([125, 1500])


def test_a_stage_without_a_whole_reply_has_no_figures() -> None:
    stage = summarize(LOAD, [outcome(0.0, fault="connection")], Objective(ttft=1))
    assert stage.ttft is None
    assert stage.output_tokens_per_second == 0
    assert stage.goodput is not None
    assert stage.goodput.good == 0


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        ("ttft:1000", True),
        ("ttft:999", False),
        ("itl:500", True),
        ("itl:499", False),
        ("gap:750", True),
        ("gap:749", False),
        ("e2e:2000", True),
        ("e2e:1999", False),
        ("ttft:1000,e2e:1999", False),
    ],
)
def test_an_objective_is_kept_to_the_millisecond(objective: str, good: bool) -> None:
    assert is_good(outcome(0.0, 1.0, 1.25, 2.0), Objective.parse(objective)) is good


def test_no_request_with_a_fault_is_good() -> None:
    assert not is_good(outcome(0.0, 1.0, fault="incomplete"), Objective.parse("ttft:5000"))
    assert not is_good(outcome(0.0, 1.0, cut=True), Objective.parse("ttft:5000"))


def test_goodput_leaves_out_what_was_cut_and_counts_what_failed() -> None:
    outcomes = [outcome(0.0, 1.0), outcome(0.0, 3.0), outcome(0.0, 2.0, fault="http_500"), outcome(0.0, cut=True)]
    goodput = summarize(LOAD, outcomes, Objective.parse("ttft:1500")).goodput
    assert goodput is not None
    assert (goodput.good, goodput.share) == (1, pytest.approx(1 / 3))
    assert goodput.requests_per_second == pytest.approx(1 / 3)
    assert goodput.objective == "ttft:1500"


def test_only_gaps_that_touch_the_long_prompts_wait_count_as_during() -> None:
    steady = outcome(0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 10.0, 11.0)
    late = outcome(0.0, 2.5, 3.5, 8.5, 10.0)
    long = outcome(4.5, 8.0, 8.1)
    assert gaps_before([steady, late], long) == [1.0, 1.0]
    assert gaps_during([steady, late], long) == [5.0, 5.0]
    found = long_prompt([steady, late], long)
    assert found.ttft_ms == pytest.approx(3500)
    assert found.prompt_tokens == 10
    assert found.stream_chunks_per_second_before == pytest.approx(1.5)
    assert found.stream_chunks_per_second_during == 0


def test_arrivals_are_those_of_their_seed_and_rate() -> None:
    due = arrivals(5000, 20.0, seed=3)
    assert due == arrivals(5000, 20.0, seed=3)
    assert due != arrivals(5000, 20.0, seed=4)
    assert due == sorted(due)
    assert due[-1] == pytest.approx(250, rel=0.1)
