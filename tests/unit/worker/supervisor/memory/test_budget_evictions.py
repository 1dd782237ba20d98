"""Evictions that are revoked, bounded and spaced."""

from itertools import pairwise

from exo.worker.supervisor.memory.budget import ALTERNATING_SECONDS, MemoryBudget
from tests.support.memory_account import Account
from tests.support.random_reservations import CAPACITY, takes


def test_an_eviction_is_revoked_when_the_waiter_is_gone() -> None:
    account = Account()
    account.load("a", takes(60))
    account.budget.begin_use("a")
    account.ask("b", takes(60))
    (a, _) = account.budget
    assert a.leaving
    account.budget.release("b")
    account.settle()
    assert not a.leaving
    account.budget.end_use("a", account.now)
    account.settle()
    assert account.unloaded == []


def test_who_waits_and_is_wanted_by_nobody_any_more_evicts_nobody() -> None:
    account = Account()
    account.load("a", takes(60))
    account.budget.begin_use("a")
    account.ask("b", takes(60))
    account.budget.begin_use("b")
    account.settle()
    account.budget.end_use("b", account.now)
    account.settle()
    assert account.unloaded == ["b"]
    (a,) = account.budget
    assert not a.leaving


def test_an_eviction_is_revoked_when_other_memory_becomes_free() -> None:
    account = Account()
    account.load("a", takes(50))
    account.load("c", takes(50))
    account.budget.begin_use("a")
    account.budget.begin_use("c")
    account.ask("b", takes(50))
    (a, c, _) = account.budget
    assert (a.leaving, c.leaving) == (True, False)
    account.budget.release("c")
    account.settle()
    assert not a.leaving
    assert "b" in account.granted


def test_who_is_evicted_is_not_spared_for_having_ended_one_of_its_requests() -> None:
    account = Account()
    account.load("a", takes(50))
    account.load("c", takes(50))
    for name in ("a", "a", "c"):
        account.budget.begin_use(name)
    account.ask("b", takes(50))
    account.budget.end_use("a", account.now)
    account.settle()
    (a, c, _) = account.budget
    assert (a.leaving, c.leaving) == (True, False)


def test_requests_keep_others_waiting_for_the_drain_limit_and_no_longer() -> None:
    account = Account(MemoryBudget(CAPACITY, drain=10))
    account.load("a", takes(60))
    account.budget.begin_use("a")
    began = account.now + 1
    account.ask("b", takes(60))
    assert account.budget.next_expiry() == began + 10
    account.now = began + 8
    assert account.settle().displace == ()
    assert account.settle().displace == ("a",)
    assert account.settle().displace == ()
    account.budget.release("a")
    account.settle()
    assert "b" in account.granted


def test_the_time_that_a_runner_takes_to_load_is_not_that_of_its_requests() -> None:
    account = Account(MemoryBudget(CAPACITY, drain=10))
    account.ask("a", takes(60))
    account.budget.begin_use("a")
    account.ask("b", takes(60))
    account.now += 100
    assert account.settle().displace == ()
    account.budget.loaded("a", account.now)
    assert account.settle().displace == ()
    account.now += 10
    assert account.settle().displace == ("a",)


def test_requests_of_a_runner_that_is_dismissed_keep_others_waiting_no_longer_either() -> None:
    account = Account(MemoryBudget(CAPACITY, drain=10))
    account.load("a", takes(60))
    account.budget.begin_use("a")
    account.budget.dismiss("a")
    account.now += 100
    assert account.settle().displace == ()
    account.ask("b", takes(60))
    account.now += 10
    assert account.settle().displace == ("a",)


def test_two_models_that_alternate_stay_for_a_while_each() -> None:
    """Both are always wanted: without a minimum each would go as soon as the other's request comes."""
    account = Account(MemoryBudget(CAPACITY, residence=10, drain=10))
    loads: list[float] = []
    resident = ""
    while account.now < 200:
        for kind in "ab":
            if kind == resident.partition("-")[0]:
                continue
            name = f"{kind}-{len(loads)}"
            if name not in account.names:
                account.budget.enter(name, account.now, kind=kind)
                account.budget.begin_use(name)
                account.budget.estimate(name, takes(60))
            account.settle()
            if name in account.granted:
                resident = name
                loads.append(account.now)
                account.budget.loaded(name, account.now)
                account.budget.end_use(name, account.now)
    assert len(loads) > 10
    assert loads[1] - loads[0] < 5, "a model that was not evicted before has no privilege"
    assert all(later - earlier >= 10 for earlier, later in pairwise(loads[2:]))


def test_a_model_that_comes_back_later_has_no_privilege() -> None:
    account = Account(MemoryBudget(CAPACITY, residence=10))
    account.load("a", takes(60))
    account.load("b", takes(60))
    account.now += ALTERNATING_SECONDS
    account.load("a", takes(60))
    account.load("b", takes(60))
    assert account.unloaded == ["a", "b", "a"]


def test_a_timer_is_set_for_the_end_of_a_stay() -> None:
    account = Account(MemoryBudget(CAPACITY, residence=10))
    for name in "aba":
        account.load(name, takes(60))
    loaded = account.now
    account.ask("b", takes(60))
    assert account.unloaded == ["a", "b"]
    assert account.budget.next_expiry() == loaded + 10
    account.now = loaded + 9
    account.settle()
    assert account.unloaded == ["a", "b", "a"]
    assert "b" in account.granted
