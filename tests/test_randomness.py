import statistics

from exo.worker.randomness import uniform


def test_the_same_seed_and_position_give_the_same_number() -> None:
    assert uniform(7, 100) == uniform(7, 100)


def test_known_values_keep_other_engines_and_later_versions_in_step() -> None:
    # splitmix64's published first output for state 0 is 0xE220A8397B1DCDAF: the seed is mixed once, then each position
    # advances the state by the golden gamma.
    seed_state = 0xE220A8397B1DCDAF
    mixed = (seed_state + 3 * 0x9E3779B97F4A7C15) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & (2**64 - 1)
    mixed ^= mixed >> 31
    assert uniform(0, 3) == (mixed >> 11) / 2**53


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    for numbers in ([uniform(1, i) for i in range(4000)], [uniform(i, 1) for i in range(4000)]):
        assert all(0 <= number < 1 for number in numbers)
        assert abs(statistics.mean(numbers) - 0.5) < 0.02
        assert all(abs(sum(n < q for n in numbers) / 4000 - q) < 0.03 for q in (0.1, 0.25, 0.75, 0.9))


def test_neighbouring_seeds_do_not_repeat_each_other_shifted() -> None:
    first = {uniform(0, position) for position in range(1000)}
    assert not first & {uniform(1, position) for position in range(1000)}
