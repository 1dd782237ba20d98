from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo.worker.protocol.runners import Prefer
from exo.worker.speed import MARGIN, NEEDED, Pick, Point, Preference, Speed, pick


def speed(totals: Mapping[int, float], first: float = 0.1, stream: float = 100) -> Speed:
    return {at: Point(first=first, stream=stream, total=total, count=NEEDED, at=0) for at, total in totals.items()}


def preference(
    speeds: Mapping[str, Speed],
    *,
    prefer: Prefer = "throughput",
    load: int = 1,
    sent: Mapping[str, int] | None = None,
    incumbent: str | None = None,
) -> Preference:
    return Preference(prefer, load, speeds, sent or {}, incumbent)


LONE_AND_CROWD = {"cuda": speed({1: 100, 8: 110}), "mlx": speed({1: 50, 8: 400})}


def test_a_lone_request_and_a_crowd_go_where_each_was_measured_faster() -> None:
    lone = pick(["cuda", "mlx"], preference(LONE_AND_CROWD, load=1))
    crowd = pick(["cuda", "mlx"], preference(LONE_AND_CROWD, load=8))
    assert lone == Pick("cuda", "figures", "prefer throughput: of 1 at once, cuda made 100 tokens/s and mlx 50")
    assert crowd == Pick("mlx", "figures", "prefer throughput: of 8 at once, mlx made 400 tokens/s and cuda 110")


def test_latency_is_a_requests_own_time_however_much_is_made_in_all() -> None:
    speeds = {"cuda": speed({1: 10}, first=2, stream=990), "mlx": speed({1: 999}, first=0.1, stream=33)}
    answer = pick(["mlx", "cuda"], preference(speeds, prefer="latency"))
    assert answer == Pick(
        "cuda", "figures", "prefer latency: of 1 at once, 100 tokens took 2.1 s with cuda and 3.1 s with mlx"
    )


def test_between_what_was_measured_figures_lie_on_a_line() -> None:
    measured = {"cuda": speed({2: 100, 8: 200}), "mlx": speed({1: 90, 4: 200})}
    answer = pick(["cuda", "mlx"], preference(measured, load=4))
    assert answer.why == "prefer throughput: of 4 at once, mlx made 200 tokens/s and cuda 150"


def test_only_runners_that_have_loaded_the_model_are_compared() -> None:
    loaded = preference(LONE_AND_CROWD, load=8)
    for runners in ([], ["cuda"]):
        answer = pick(runners, loaded)
        assert (answer.runner, answer.basis) == (None, "order")
        assert "once several runners have loaded the model" in answer.why
    three = pick(["vllm", "cuda", "mlx"], preference({"vllm": speed({8: 900}), **LONE_AND_CROWD}, load=8))
    assert three.runner == "vllm"
    assert three.why.endswith("vllm made 900 tokens/s, mlx 400 and cuda 110")


@pytest.mark.parametrize(("total", "taken"), [(105, "cuda"), (109, "cuda"), (112, "mlx"), (95, "cuda"), (50, "cuda")])
def test_the_cards_first_stays_unless_another_is_faster_by_a_margin(total: float, taken: str) -> None:
    answer = pick(["cuda", "mlx"], preference({"cuda": speed({1: 100}), "mlx": speed({1: total})}))
    assert answer.runner == taken
    assert ("too close to leave cuda" in answer.why) == (100 < total < 110)


def test_what_was_taken_last_stays_unless_another_is_faster_by_a_margin() -> None:
    taken = ["cuda"]
    for total in (105, 109, 111, 105, 95, 92, 90, 95, 105, 109):
        speeds = {"cuda": speed({1: 100}), "mlx": speed({1: total})}
        taken.append(str(pick(["cuda", "mlx"], preference(speeds, incumbent=taken[-1])).runner))
    assert taken == ["cuda"] * 3 + ["mlx"] * 4 + ["cuda"] * 4


def test_what_lacks_measurements_is_tried_first_in_the_cards_order() -> None:
    nothing = pick(["mlx", "cuda"], preference({}, load=3))
    assert nothing == Pick("mlx", "trial", "prefer throughput: too little is measured of mlx with 3 at once")
    assert pick(["mlx", "cuda"], preference({"mlx": speed({4: 9})}, load=3)).runner == "cuda"
    assert pick(["mlx", "cuda"], preference({"mlx": speed({1: 9, 8: 9})}, load=3)).runner == "cuda"
    assert pick(["mlx", "cuda"], preference({"mlx": speed({1: 9, 2: 9})}, load=3)).runner == "mlx"
    assert pick(["mlx", "cuda"], preference({"mlx": speed({1: 9}), "cuda": speed({2: 9})}, load=1)).runner == "cuda"


def test_tries_that_lead_to_no_measurement_come_to_an_end_and_once_in_a_while_again() -> None:
    measured = {"cuda": speed({8: 100}), "mlx": speed({1: 50, 8: 400})}
    sent = {"cuda": 0, "mlx": 0}
    course: list[str] = []
    for _ in range(400):
        answer = pick(["cuda", "mlx"], preference(measured, load=1, sent=sent))
        assert answer.runner is not None
        sent[answer.runner] += 1
        course.append(answer.basis)
    tries = 2 * NEEDED
    assert course[: tries + 1] == ["trial"] * tries + ["figures"]
    assert 3 * tries <= course.count("trial") <= 6 * tries


def test_without_tries_left_the_nearest_load_that_all_were_measured_at_decides() -> None:
    measured = {"cuda": speed({8: 100}), "mlx": speed({1: 5, 8: 400})}
    answer = pick(["cuda", "mlx"], preference(measured, load=1, sent={"cuda": 6}))
    assert answer == Pick(
        "mlx",
        "figures",
        "prefer throughput: of 8 at once (the nearest measured to 1), mlx made 400 tokens/s and cuda 100",
    )


def test_without_any_load_in_common_the_cards_order_decides() -> None:
    apart = {"cuda": speed({8: 100}), "mlx": speed({1: 50})}
    answer = pick(["cuda", "mlx"], preference(apart, load=1, sent={"cuda": 6}))
    assert answer == Pick(None, "order", "prefer throughput has too few measurements of cuda and mlx")
    answer = pick(["cuda", "mlx"], preference({"mlx": speed({1: 50})}, load=1, sent={"cuda": 6}))
    assert answer.why == "prefer throughput has too few measurements of cuda"


# --- properties ---

RUNNERS = ("cuda", "mlx", "vllm")
points = st.builds(
    Point,
    first=st.floats(0.001, 100),
    stream=st.floats(0.01, 10_000),
    total=st.floats(0.01, 100_000),
    count=st.just(NEEDED),
    at=st.just(0),
)
preferences = st.builds(
    Preference,
    prefer=st.sampled_from(("latency", "throughput")),
    load=st.integers(1, 300),
    speeds=st.dictionaries(st.sampled_from(RUNNERS), st.dictionaries(st.sampled_from([1, 2, 4, 8]), points)),
    sent=st.dictionaries(st.sampled_from(RUNNERS), st.integers(0, 10_000)),
    incumbent=st.sampled_from([None, *RUNNERS]),
)
orders = st.lists(st.sampled_from(RUNNERS), unique=True)


@given(loaded=orders, asked=preferences)
def test_whatever_is_picked_is_loaded_and_explained(loaded: list[str], asked: Preference) -> None:
    answer = pick(loaded, asked)
    assert answer.runner in (None, *loaded)
    assert (answer.runner is None) == (answer.basis == "order")
    assert answer.why.startswith(f"prefer {asked.prefer}")
    assert answer.why.isascii()
    assert answer.why.isprintable()
    assert len(answer.why) < 300
    assert answer.runner is None or answer.runner in answer.why
    assert pick(loaded, asked) == answer


@given(loaded=orders, asked=preferences)
def test_by_figures_nothing_is_picked_that_another_beats_by_more_than_the_margin(
    loaded: list[str], asked: Preference
) -> None:
    asked = Preference(asked.prefer, 1, asked.speeds, asked.sent, asked.incumbent)
    answer = pick(loaded, asked)
    if answer.basis != "figures" or not all(1 in asked.speeds.get(each, {}) for each in loaded):
        return
    figures = {each: asked.speeds[each][1].figure(asked.prefer) for each in loaded}
    assert answer.runner is not None
    mine = figures[answer.runner]
    if asked.prefer == "latency":
        assert mine <= min(figures.values()) * (1 + MARGIN)
    else:
        assert mine * (1 + MARGIN) >= max(figures.values())
