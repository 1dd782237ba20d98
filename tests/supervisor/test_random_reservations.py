"""The memory budget under ten thousand random sequences of events."""

from random import Random

from tests.support.random_reservations import EVENTS, Lives


def test_nothing_is_leaked_or_given_twice_in_ten_thousand_random_sequences() -> None:
    random = Random(0)
    for _ in range(10_000):
        lives = Lives()
        for _ in range(random.randrange(5, 25)):
            lives.happens(random.choice(EVENTS), random.randrange(4000))
        lives.end()
