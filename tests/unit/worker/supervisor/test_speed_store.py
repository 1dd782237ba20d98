import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exo.cards.card import ModelCard
from exo.worker.host import Host, NvidiaDevice
from exo.worker.protocol.events import (
    Delta,
    Failed,
    Finished,
    FinishReason,
    Usage,
)
from exo.worker.protocol.probe import Probe
from exo.worker.protocol.runners import Prefer
from exo.worker.speed import NEEDED, Measurement, Point, figure_at, level
from exo.worker.supervisor.request_timer import RequestCount, RequestTimer
from exo.worker.supervisor.speed_store import FRESH_SECONDS, SpeedStore
from tests.conftest import fake_card

NOW = 1_800_000_000.0
CARD = fake_card(slots=4)
PROBES = {name: Probe(installed=True, engine=name, version="1") for name in ("cuda", "mlx")}
HOST = Host("Linux", "x86_64", 2, 1 << 30, 1 << 29, (), PROBES, processor="Abacus 3000")

rates = st.floats(0.01, 1e6)
measurements = st.builds(Measurement, load=st.floats(1, 1000), first=rates, stream=rates, total=rates)
points = st.builds(Point, first=rates, stream=rates, total=rates, count=rates, at=st.just(NOW))
preferences = st.sampled_from(("latency", "throughput"))


def point(total: float = 100, first: float = 0.5, stream: float = 50) -> Point:
    return Point(first=first, stream=stream, total=total, count=NEEDED, at=NOW)


def measured(load: float = 1, total: float = 100) -> Measurement:
    return Measurement(load=load, first=0.5, stream=total, total=total)


# --- points ---


@pytest.mark.parametrize(
    ("load", "at"), [(1, 1), (1.4, 1), (1.5, 2), (2, 2), (3, 4), (4, 4), (5.6, 4), (6, 8), (9, 8), (12, 16), (100, 128)]
)
def test_a_load_counts_for_the_nearest_power_of_two(load: float, at: int) -> None:
    assert level(load) == at


@given(st.lists(measurements, min_size=1, max_size=20))
def test_a_point_stays_within_what_was_measured(taken: list[Measurement]) -> None:
    smoothed = Point.of(taken[0], NOW)
    for each in taken[1:]:
        smoothed = smoothed.take(each, NOW)
    for name in ("first", "stream", "total"):
        values = [getattr(each, name) for each in taken]
        assert min(values) * 0.999 <= getattr(smoothed, name) <= max(values) * 1.001
    assert smoothed.count == sum(1 / level(each.load) for each in taken)


def test_a_point_begins_as_a_mean_and_follows_what_has_changed() -> None:
    smoothed = Point.of(measured(total=100), NOW).take(measured(total=200), NOW).take(measured(total=300), NOW)
    assert smoothed.total == pytest.approx(200)
    for _ in range(30):
        smoothed = smoothed.take(measured(total=1000), NOW)
    assert smoothed.total == pytest.approx(1000, rel=0.01)
    assert smoothed.take(measured(total=1), NOW).total > 750


def test_sequences_of_one_crowd_count_for_one() -> None:
    crowd = Point.of(measured(load=8), NOW)
    for _ in range(7):
        crowd = crowd.take(measured(load=8), NOW)
    assert crowd.count == 1


def test_latency_is_what_a_typical_request_takes() -> None:
    assert point(first=0.5, stream=99).figure("latency") == pytest.approx(1.5)
    assert point(total=70).figure("throughput") == 70


def test_between_two_points_lies_a_line_and_beyond_them_the_nearest() -> None:
    speed = {2: point(100), 8: point(300)}
    figures = [figure_at(speed, load, "throughput") for load in (1, 2, 4, 8, 16)]
    assert figures == pytest.approx([100, 100, 200, 300, 300])


@given(
    speed=st.dictionaries(st.sampled_from([1, 2, 4, 8, 16]), points, min_size=1),
    load=st.integers(1, 40),
    prefer=preferences,
)
def test_a_figure_lies_between_those_of_the_points(speed: dict[int, Point], load: int, prefer: Prefer) -> None:
    figures = [each.figure(prefer) for each in speed.values()]
    assert min(figures) * 0.999 <= figure_at(speed, load, prefer) <= max(figures) * 1.001


# --- measuring ---


class Clocked:
    """A stopwatch, and what it has measured."""

    def __init__(self, everyones: RequestCount | None = None, *, warm: bool = True) -> None:
        self.measured: list[Measurement] = []
        self.watch = RequestTimer(everyones or RequestCount(), self.measured.append)
        if warm:
            self.request("warm-up", 0, 0)
            assert self.measured == []

    def begin(self, name: str, now: float, *, measured: bool = True) -> None:
        self.watch.begin(name, now, measured=measured)

    def tokens(self, names: str, now: float, each: int = 1) -> None:
        items = [Delta(id=name, tokens=(1,) * each, text="") for name in names.split()]
        self.watch.deltas(items, each * len(items), now)

    def end(self, name: str, now: float, tokens: int, reason: FinishReason = "length") -> None:
        usage = Usage(prompt_tokens=1, completion_tokens=tokens)
        self.watch.take(Finished(id=name, reason=reason, usage=usage), now)

    def request(self, name: str, at: float, seconds: float, tokens: int = 21) -> None:
        """The first token comes after a fifth of the time."""
        self.begin(name, at)
        self.tokens(name, at + seconds / 5)
        self.tokens(name, at + seconds, each=tokens - 1)
        self.end(name, at + seconds, tokens)


def test_a_lone_request_tells_its_own_speed() -> None:
    clocked = Clocked()
    clocked.request("a", at=100, seconds=5)
    assert clocked.measured == [Measurement(load=1, first=1, stream=5, total=21 / 5)]


def test_of_a_crowd_each_request_tells_of_all() -> None:
    clocked = Clocked()
    for name in "abcd":
        clocked.begin(name, 10)
    for at in range(1, 21):
        clocked.tokens("a b c d", 10 + at)
    for name in "abcd":
        clocked.end(name, 30, 20)
    assert clocked.measured == [Measurement(load=4, first=1, stream=1, total=4)] * 4


def test_the_load_is_the_mean_over_a_requests_time() -> None:
    clocked = Clocked()
    clocked.begin("long", 0)
    clocked.tokens("long", 1)
    clocked.begin("other", 5)
    clocked.end("other", 8, 0)
    clocked.tokens("long", 10, each=10)
    clocked.end("long", 10, 11)
    assert [each.load for each in clocked.measured] == [pytest.approx(1.3)]


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled"])
def test_what_was_cancelled_tells_nothing(reason: FinishReason) -> None:
    clocked = Clocked()
    clocked.begin("a", 0)
    clocked.tokens("a", 1)
    clocked.tokens("a", 2, each=20)
    clocked.end("a", 2, 21, reason)
    assert len(clocked.measured) == (reason != "cancelled")


def test_a_first_request_a_short_one_and_one_begun_elsewhere_tell_nothing() -> None:
    cold = Clocked(warm=False)
    cold.request("first", 0, 1)
    assert cold.measured == []
    clocked = Clocked()
    clocked.request("short", 0, 1, tokens=5)
    clocked.begin("replayed", 5, measured=False)
    clocked.tokens("replayed", 6)
    clocked.end("replayed", 7, 100)
    assert clocked.measured == []
    clocked.request("whole", 10, 1)
    assert len(clocked.measured) == 1


def test_nothing_is_measured_while_another_runner_is_busy() -> None:
    everyones = RequestCount()
    clocked, other = Clocked(everyones), Clocked(everyones)
    other.begin("other", 0)
    clocked.request("beside", 1, 1)
    assert clocked.measured == []
    other.watch.take(Failed(id="other", code="engine_error", message=""), 3)
    clocked.request("alone", 3, 1)
    assert [each.load for each in clocked.measured] == [1]
    other.begin("next", 5)
    other.watch.close(6)
    clocked.request("again", 6, 1)
    assert len(clocked.measured) == 2


# --- the account and its file ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "speeds.json"


def speeds(file: Path | None = None, host: Host = HOST) -> SpeedStore:
    made = SpeedStore(file)
    made.set_host(host)
    return made


def save(account: SpeedStore) -> None:
    account.save(account.unsaved())


def learn(
    account: SpeedStore, card: ModelCard = CARD, times: int = NEEDED, now: float = NOW, total: float = 100
) -> SpeedStore:
    for _ in range(times):
        account.add(card, "cuda", measured(total=total), now)
    return account


def totals(account: SpeedStore, card: ModelCard = CARD, now: float = NOW) -> dict[int, float]:
    return {at: each.total for at, each in account.known(card, now)["cuda"].items()}


def test_measurements_outlive_the_server(file: Path) -> None:
    before = learn(speeds(file))
    before.add(CARD, "cuda", measured(load=8.2, total=400), NOW)
    assert not file.exists()
    save(before)
    after = speeds(file)
    assert after.known(CARD, NOW) == before.known(CARD, NOW)
    assert totals(after) == pytest.approx({1: 100, 8: 400})
    assert [each.name for each in file.parent.iterdir()] == ["speeds.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 2, "entries": []}',
        b'{"version": 1, "entries": [{"model": "fake/model"}]}',
        b'{"version": 1, "entries": [{"model": "m", "runner": "cuda", "host": "h", "table": "t", "points": {"1": '
        b'{"first": 0, "stream": 1, "total": 1, "count": 1, "at": 1}}}]}',
        b'{"version": 1, "entries": [{"model": "m", "runner": "cuda", "host": "h", "table": "t", "points": {"1": '
        b'{"first": NaN, "stream": 1, "total": 1, "count": 1, "at": 1}}}]}',
        b'{"version": 1, "entries": [{"model": "m", "runner": "cuda", "host": "h", "table": "t", "points": {"0": '
        b'{"first": 1, "stream": 1, "total": 1, "count": 1, "at": 1}}}]}',
        b" " * (17 << 20),
        b"[" * 100_000,
    ],
    ids=range(11),
)
def test_a_damaged_file_is_ignored_and_replaced(file: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        account = speeds(file)
    assert [str(file) in record.message for record in caplog.records] == [True]
    assert totals(account) == {}
    save(learn(account))
    assert totals(speeds(file)) == {1: 100}


def test_a_file_that_cannot_be_written_is_told_of_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("not a directory")
    account = learn(speeds(tmp_path / "state" / "speeds.json"))
    save(account)
    save(learn(account))
    assert ["cannot be written" in record.message for record in caplog.records].count(True) == 1
    assert totals(account) == {1: 100}


def test_servers_that_share_a_file_keep_each_others_measurements(file: Path) -> None:
    other = fake_card("fake/other")
    first, second = speeds(file), speeds(file)
    save(learn(first))
    save(learn(second, other, total=70))
    save(learn(first, total=100))
    after = speeds(file)
    assert (totals(after), totals(after, other)) == ({1: 100}, {1: 70})


@pytest.mark.parametrize(
    "host",
    [
        replace(HOST, processor="Abacus 4000"),
        replace(HOST, cpu_count=64),
        replace(HOST, nvidia_devices=(NvidiaDevice("NVIDIA H200", "9.0", 1, 1),)),
        replace(HOST, probes={**PROBES, "cuda": Probe(installed=True, engine="cuda", version="2")}),
    ],
    ids=["processor", "count", "device", "engine"],
)
def test_on_another_host_nothing_of_it_holds_and_back_on_the_first_all_does(file: Path, host: Host) -> None:
    save(learn(speeds(file)))
    elsewhere = speeds(file, host)
    assert totals(elsewhere) == {}
    save(learn(elsewhere, total=5))
    assert totals(speeds(file, host)) == {1: 5}
    assert totals(speeds(file)) == {1: 100}


def test_memory_that_is_free_now_is_no_other_host(file: Path) -> None:
    save(learn(speeds(file)))
    assert totals(speeds(file, replace(HOST, memory_available=5))) == {1: 100}


def test_with_another_engine_table_nothing_of_it_holds(file: Path) -> None:
    save(learn(speeds(file)))
    changed = fake_card(slots=8)
    account = speeds(file)
    assert totals(account, changed) == {}
    save(learn(account, changed, total=5))
    assert totals(speeds(file), changed) == {1: 5}
    assert totals(speeds(file)) == {}
    elsewhere = changed.model_copy(update={"engines": {**changed.engines, "mlx": {"dtype": "float32"}}})
    assert totals(speeds(file), elsewhere) == {1: 5}


def test_what_is_a_day_old_is_measured_again() -> None:
    account = learn(speeds())
    later = NOW + FRESH_SECONDS + 1
    assert totals(account, now=NOW + FRESH_SECONDS - 1) == {1: 100}
    assert totals(account, now=later) == {}
    assert totals(account, now=NOW - FRESH_SECONDS - 1) == {}
    learn(account, times=1, now=later, total=5)
    assert totals(account, now=later) == {1: 5}


def test_a_preference_has_what_was_measured_often_enough() -> None:
    account = learn(speeds(), times=NEEDED - 1)
    assert account.preference(CARD, None, 1, NOW) is None
    for expected in ([], [1]):
        preference = account.preference(CARD, "latency", 9, NOW)
        assert preference is not None
        assert [*preference.speeds["cuda"]] == expected
        assert (preference.prefer, preference.load, preference.sent["cuda"]) == ("latency", 9, 0)
        learn(account, times=1)


def test_what_was_sent_where_is_counted_by_load_and_figures_make_the_incumbent() -> None:
    account = speeds()
    account.count_request(CARD.model_id, "cuda", 9, "trial")
    account.count_request(CARD.model_id, "cuda", 8, "figures")
    account.count_request(CARD.model_id, "mlx", 8, "trial")
    account.count_request(CARD.model_id, "mlx", 8, "order")
    crowd, lone = (account.preference(CARD, "latency", load, NOW) for load in (8, 1))
    assert crowd is not None
    assert lone is not None
    assert crowd.sent == {"cuda": 2, "mlx": 1}
    assert lone.sent == {"cuda": 0, "mlx": 0}
    assert crowd.incumbent == lone.incumbent == "cuda"


def test_two_servers_keep_what_both_have_measured(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    first, second = speeds(file), speeds(file)
    for at, account in enumerate((first, second, first)):
        account.add(CARD, "cuda", measured(load=4**at), NOW + at)
        save(account)
    assert sorted(speeds(file).known(CARD, NOW)["cuda"]) == [level(4**at) for at in range(3)]


def test_many_servers_write_at_once(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    accounts = [speeds(file) for _ in range(16)]
    cards = [fake_card(f"fake/{number}") for number in range(16)]
    for account, card in zip(accounts, cards, strict=True):
        account.add(card, "cuda", measured(), NOW)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(save, accounts))
    assert all(speeds(file).known(card, NOW)["cuda"] for card in cards)
