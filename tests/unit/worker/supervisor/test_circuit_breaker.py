from hypothesis import given
from hypothesis import strategies as st

from exo.worker.protocol.events import Failed
from exo.worker.supervisor.circuit_breaker import (
    AVOIDED_SECONDS,
    FAILURES_TO_AVOID,
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    CircuitBreaker,
)

DIED = Failed(code="runner_died", message="the runner was killed by SIGKILL")


def after(failures: int, jitter: float = 0.0) -> CircuitBreaker:
    """At the time 100."""
    health = CircuitBreaker()
    for _ in range(failures):
        health.failed(DIED, 100.0, jitter)
    return health


def test_one_failure_may_be_an_accident() -> None:
    assert after(1).pause(100) == 0
    assert not after(1).avoided(100)


def test_the_pause_doubles_up_to_a_bound() -> None:
    pauses = [after(failures).pause(100) for failures in range(2, 60)]
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


@given(failures=st.integers(2, 40), jitter=st.floats(0, 1))
def test_jitter_takes_at_most_half_of_the_pause(failures: int, jitter: float) -> None:
    longest = after(failures).pause(100)
    assert longest / 2 <= after(failures, jitter).pause(100) <= longest


def test_a_pause_ends_and_a_runner_that_was_avoided_gets_another_chance() -> None:
    health = after(FAILURES_TO_AVOID)
    assert health.avoided(100)
    assert health.pause(100 + 4 * FIRST_PAUSE_SECONDS) == 0
    assert not health.avoided(100 + AVOIDED_SECONDS)


def test_a_failure_that_will_come_again_is_avoided_at_once() -> None:
    health = CircuitBreaker()
    health.failed(DIED, 100, 0, lasting=True)
    assert health.avoided(100)
    assert health.pause(100) == 0
    health.worked()
    assert not health.avoided(100)


def test_a_token_forgives_all_failures_and_their_count_stays() -> None:
    health = after(10)
    health.worked()
    assert (health.failures, health.pause(100), health.avoided(100)) == (0, 0, False)
    assert (health.deaths, health.last, health.last_at) == (10, DIED, 100)
    health.failed(DIED, 100, 0)
    assert health.pause(100) == 0
    assert health.deaths == 11
