"""The accounts of memory by themselves: random lives of many models against a plain model of what must hold."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exo.worker.protocol.events import Estimated, LoadOption
from exo.worker.supervisor.memory.budget import MemoryBudget
from exo.worker.supervisor.memory.memory import Memory
from tests.support.memory_account import Account
from tests.support.random_reservations import CAPACITY, EVENTS, Lives, takes


def both(host: int, first: int, second: int = 0) -> Memory:
    return Memory(host, {"CUDA0": first, "CUDA1": second})


def test_two_loads_cannot_have_the_same_bytes() -> None:
    account = Account()
    account.load("a", takes(60), pinned=True)
    account.ask("b", takes(60))
    assert account.refused == ["b"]
    assert account.names == ["a"]


def test_the_least_recently_used_of_the_idle_ones_goes_and_no_more_than_needed() -> None:
    account = Account()
    for name in "abc":
        account.load(name, takes(30))
    account.serve("a")
    account.ask("d", takes(35))
    assert account.unloaded == ["b"]
    assert set(account.names) == {"a", "c", "d"}


def test_a_small_one_stays_where_unloading_a_later_one_alone_makes_room() -> None:
    account = Account()
    account.load("small", takes(10))
    account.load("large", takes(80))
    account.ask("new", takes(85))
    assert account.unloaded == ["large"]


def test_who_is_busy_finishes_first_and_takes_no_more() -> None:
    account = Account()
    account.load("a", takes(60))
    account.budget.begin_use("a")
    account.ask("b", takes(60))
    assert account.refused == account.unloaded == []
    assert "b" not in account.granted
    (a, _) = account.budget
    assert a.leaving
    account.budget.end_use("a", account.now)
    account.settle()
    assert account.unloaded == ["a"]
    assert "b" in account.granted


def test_who_loads_is_let_load_and_serve_before_it_makes_room() -> None:
    account = Account()
    account.ask("a", takes(60))
    account.budget.begin_use("a")
    account.ask("b", takes(60))
    account.budget.loaded("a", account.now)
    account.settle()
    assert account.unloaded == []
    account.budget.end_use("a", account.now)
    account.settle()
    assert (account.unloaded, list(account.granted)) == (["a"], ["a", "b"])


def test_idle_ones_go_before_busy_ones() -> None:
    account = Account()
    account.load("busy", takes(40))
    account.budget.begin_use("busy")
    account.load("idle", takes(40))
    account.ask("new", takes(55))
    assert account.unloaded == ["idle"]
    assert "new" in account.granted


def test_a_later_one_goes_ahead_where_it_fits_beside_all_before_it() -> None:
    account = Account()
    account.load("a", takes(60))
    account.budget.begin_use("a")
    account.ask("large", takes(85))
    account.ask("small", takes(20))
    assert list(account.granted) == ["a"]
    account.ask("other", takes(0, 50))
    assert list(account.granted) == ["a", "other"]
    account.budget.end_use("a", account.now)
    account.settle()
    assert list(account.granted) == ["a", "other", "large"]


def test_a_refusal_tells_both_numbers_and_the_smallest_change_of_each_setting_that_fits() -> None:
    account = Account()
    account.load("pinned", takes(30), pinned=True)
    remedies = (
        LoadOption(settings={"n_ctx": 2048}, host=90),
        LoadOption(settings={"n_ctx": 1024}, host=70),
        LoadOption(settings={"n_ctx": 512}, host=50),
        LoadOption(settings={"slots": 1}, host=71),
        LoadOption(settings={"cache_type_k": "q8_0", "cache_type_v": "q8_0"}, host=60),
    )
    account.budget.enter("new", 0)
    account.budget.estimate("new", Estimated(choices=(LoadOption(host=120, device=20),), remedies=remedies))
    refusal = account.budget.settle(1).refused["new"]
    assert (refusal.needed, refusal.room) == (both(120, 20), both(70, 50, 30))
    assert refusal.message("org/new", "cuda") == (
        "org/new needs 120 bytes of memory, and at most 70 can be freed for it here; with n_ctx = 1024, or "
        'cache_type_k = "q8_0" and cache_type_v = "q8_0" in [cuda] of its model card it would fit'
    )


def test_a_refusal_without_a_remedy_says_so() -> None:
    account = Account()
    account.budget.enter("new", 0)
    account.budget.estimate("new", takes(10, 60))
    message = account.budget.settle(1).refused["new"].message("org/new", "mlx")
    assert "needs 60 bytes of memory on CUDA0, and at most 50 can be freed" in message
    assert "no setting of [mlx] in its model card would make it fit" in message


def test_each_device_is_an_account_of_its_own() -> None:
    account = Account()
    account.load("first", takes(10, CUDA0=50), pinned=True)
    account.load("second", takes(10, CUDA1=30), pinned=True)
    assert account.budget.free == Memory(80)
    account.ask("third", takes(10, CUDA1=1))
    assert account.refused == ["third"]


def test_what_does_not_say_which_device_takes_the_first() -> None:
    account = Account()
    account.load("first", takes(10, 45))
    assert account.budget.reserved == both(10, 45)
    account.load("named", takes(10, 2, CUDA0=3, CUDA1=4))
    assert account.budget.reserved == both(20, 50, 4)


def test_who_has_nothing_of_what_is_short_stays() -> None:
    account = Account()
    account.load("oldest", takes(5, CUDA0=40))
    account.load("short", takes(5, CUDA1=25))
    account.load("newest", takes(5, CUDA0=5, CUDA1=5))
    account.ask("new", takes(5, CUDA1=20))
    assert account.unloaded == ["short"]


def test_both_devices_are_freed_where_both_are_short() -> None:
    account = Account()
    account.load("a", takes(5, CUDA0=40))
    account.load("b", takes(5, CUDA1=25))
    account.ask("new", takes(5, CUDA0=20, CUDA1=20))
    assert set(account.unloaded) == {"a", "b"}
    assert "new" in account.granted


def test_a_refusal_names_each_device_that_is_short_and_the_devices_on_which_it_would_fit() -> None:
    account = Account()
    account.load("pinned", takes(5, CUDA0=20, CUDA1=25), pinned=True)
    remedies = (
        LoadOption(settings={"n_ctx": 512}, host=5, devices={"CUDA0": 31, "CUDA1": 1}),
        LoadOption(settings={"devices": ["CUDA1"]}, host=5, devices={"CUDA1": 6}),
        LoadOption(settings={"devices": ["CUDA0"]}, host=5, devices={"CUDA0": 30}),
    )
    choice = LoadOption(host=5, devices={"CUDA0": 40, "CUDA1": 10})
    account.budget.enter("new", 0)
    account.budget.estimate("new", Estimated(choices=(choice,), remedies=remedies))
    message = account.budget.settle(1).refused["new"].message("org/new", "cuda")
    assert message == (
        "org/new needs 40 bytes of memory on CUDA0, and at most 30 can be freed for it and "
        "10 bytes of memory on CUDA1, and at most 5 can be freed for it here; "
        'with devices = ["CUDA0"] in [cuda] of its model card it would fit'
    )


def test_a_device_that_is_not_there_has_no_memory() -> None:
    account = Account()
    account.budget.enter("new", 0)
    account.budget.estimate("new", takes(10, CUDA7=1))
    message = account.budget.settle(1).refused["new"].message("org/new", "cuda")
    assert "needs 1 bytes of memory on CUDA7, and at most 0 can be freed" in message


def test_how_devices_share_a_model_is_chosen_by_what_is_free_and_others_go_for_the_usual_way() -> None:
    free = LoadOption(settings={"tensor_split": [0.1, 0.9]}, host=5, devices={"CUDA0": 2, "CUDA1": 18})
    usual = LoadOption(settings={"tensor_split": [0.6, 0.4]}, host=5, devices={"CUDA0": 12, "CUDA1": 8})
    estimated = Estimated(choices=(free, usual), enough=1)
    account = Account()
    account.load("a", takes(5, CUDA0=45))
    account.ask("new", estimated)
    assert (account.unloaded, account.granted["new"]) == ([], free)
    account.load("b", takes(5, CUDA1=4))
    account.ask("again", estimated)
    assert (account.unloaded, account.granted["again"]) == (["a"], usual)


AUTO = Estimated(
    choices=tuple(LoadOption(settings={"n_ctx": n_ctx}, host=n_ctx // 64) for n_ctx in (5120, 4096, 2048, 1024, 512)),
    enough=2,
)
"""80, 64, 32, 16 and 8 bytes."""


@pytest.mark.parametrize(
    ("others", "n_ctx", "unloaded"),
    [([], 5120, []), ([30], 4096, []), ([60], 2048, []), ([70, 20], 5120, ["0"]), ([90, 5], 5120, ["0"])],
)
def test_what_is_left_open_takes_the_free_memory_and_unloads_others_for_enough(
    others: list[int], n_ctx: int, unloaded: list[str]
) -> None:
    account = Account()
    for number, host in enumerate(others):
        account.load(str(number), takes(host))
    account.ask("auto", AUTO)
    assert account.unloaded == unloaded
    assert account.granted["auto"].settings == {"n_ctx": n_ctx}
    assert account.budget.reserved.fits(CAPACITY)


def test_what_is_left_open_makes_do_with_less_where_others_are_pinned() -> None:
    account = Account()
    account.load("pinned", takes(80), pinned=True)
    account.ask("auto", AUTO)
    assert account.granted["auto"].settings == {"n_ctx": 1024}


def test_the_measured_value_replaces_the_estimate_and_keeps_what_comes_later() -> None:
    account = Account()
    account.load("a", takes(60, 20, later_host=10, later_device=5))
    account.budget.measure("a", 45, {"CUDA0": 12})
    assert account.budget.reserved == both(55, 17)
    account.budget.measure("a", 50, None)
    assert account.budget.reserved == both(55, 17)
    account.budget.measure("a", 58, {"CUDA0": 18, "CUDA1": 3})
    assert account.budget.reserved == both(58, 18, 3)


def test_devices_that_nobody_can_ask_keep_their_estimate() -> None:
    account = Account()
    account.load("a", takes(60, 20, later_device=5))
    account.budget.measure("a", 45, None)
    assert account.budget.reserved == both(45, 20)


def test_a_model_that_took_more_than_it_said_does_not_let_others_in_until_there_is_room() -> None:
    account = Account()
    account.load("a", takes(40))
    account.budget.measure("a", 95, {})
    account.budget.begin_use("a")
    account.ask("b", takes(20))
    assert "b" not in account.granted
    account.budget.end_use("a", account.now)
    account.settle()
    assert account.unloaded == ["a"]
    assert "b" in account.granted


def test_who_is_not_used_for_its_time_is_unloaded() -> None:
    account = Account()
    account.load("a", takes(10), keep=100)
    account.load("b", takes(10))
    expires = account.budget.next_expiry()
    assert 100 <= expires < account.now + 100
    account.now = expires - 2
    account.settle()
    assert account.unloaded == []
    account.settle()
    assert account.unloaded == ["a"]
    assert account.budget.next_expiry() == math.inf


def test_who_is_in_use_does_not_expire_and_begins_anew_when_it_no_longer_is() -> None:
    account = Account()
    account.load("a", takes(10), keep=0)
    account.budget.begin_use("a")
    account.now += 1000
    account.settle()
    assert account.unloaded == []
    account.budget.end_use("a", account.now)
    account.settle()
    assert account.unloaded == ["a"]


def test_without_a_capacity_everything_fits() -> None:
    budget = MemoryBudget()
    for name in "abc":
        budget.enter(name, 0)
        budget.estimate(name, takes(1 << 60))
    assert list(budget.settle(0).granted) == ["a", "b", "c"]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 4000)), max_size=60))
def test_whatever_happens_memory_is_given_once_and_to_everybody_in_turn(events: list[tuple[str, int]]) -> None:
    lives = Lives()
    for event, number in events:
        lives.happens(event, number)
    lives.end()


amounts = st.builds(both, st.integers(1, 70), st.integers(0, 40), st.integers(0, 30))


@given(st.lists(amounts, min_size=1, max_size=8), amounts)
def test_least_recently_used_first(held: list[Memory], wanted: Memory) -> None:
    """Whoever stays although it was used before one that goes, is not needed: its room would come on top."""
    account = Account()
    for number, amount in enumerate(held):
        account.ask(str(number), takes(amount.host, **amount.devices))
        if str(number) in account.granted:
            account.budget.loaded(str(number), account.now)
    before = {reservation.name: (reservation.last_used, reservation.reserved) for reservation in account.budget}
    account.unloaded.clear()
    free = account.budget.free
    account.ask("new", takes(wanted.host, **wanted.devices))
    gone = set(account.unloaded)
    room = free + sum((before[name][1] for name in gone), Memory())
    assert wanted.fits(room)
    in_order = sorted(before, key=lambda name: before[name][0])
    needed, so_far = 0, free
    while not wanted.fits(so_far):
        so_far += before[in_order[needed]][1]
        needed += 1
    assert gone <= set(in_order[:needed]), "nobody that was used later than it takes"
    assert all(not wanted.fits(room - before[name][1]) for name in gone), "nobody without need"


def test_a_forced_load_that_does_not_fit_gets_what_can_be_freed_and_the_reason_is_kept() -> None:
    account = Account()
    account.load("pinned", takes(30), pinned=True)
    account.load("idle", takes(30))
    account.budget.enter("forced", account.now, forced=True)
    account.budget.estimate("forced", takes(90))
    account.settle()
    assert account.unloaded == ["idle"]
    reservation = account.budget.reservation("forced")
    assert reservation is not None
    assert reservation.reserved.host == 70
    assert reservation.too_large is not None
    assert reservation.too_large.needs("forced") == (
        "forced needs 90 bytes of memory, and at most 70 can be freed for it here"
    )
    assert account.budget.free.host == 0


def test_a_forced_load_that_fits_is_a_usual_one() -> None:
    account = Account()
    account.budget.enter("forced", account.now, forced=True)
    account.budget.estimate("forced", takes(90))
    account.settle()
    reservation = account.budget.reservation("forced")
    assert reservation is not None
    assert (reservation.reserved.host, reservation.too_large) == (90, None)


def test_a_runner_that_has_loaded_less_than_it_was_granted_gives_back_the_rest() -> None:
    account = Account()
    account.ask("a", takes(90))
    account.budget.reduce("a", takes(50).choices[0])
    account.ask("b", takes(40))
    assert list(account.granted) == ["a", "b"]
