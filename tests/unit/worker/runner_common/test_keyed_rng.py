import numpy as np

from exo.worker.runner_common.keyed_rng import gumbels, uniforms

STREAMS = np.arange(4000)


def mix(value: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & (2**64 - 1)
    return value ^ (value >> 31)


def test_the_same_seed_and_position_give_the_same_numbers() -> None:
    assert (uniforms(7, 100, STREAMS) == uniforms(7, 100, STREAMS)).all()
    assert (uniforms(7, 100, STREAMS)[5:9] == uniforms(7, 100, np.arange(5, 9))).all()


def test_known_values_keep_other_engines_and_later_versions_in_step() -> None:
    # splitmix64's published first output for state 0 is 0xE220A8397B1DCDAF: the seed is mixed once, position and stream
    # each advance the state by multiples of the golden gamma.
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    assert mix(gamma) == 0xE220A8397B1DCDAF
    bits = mix((mix((mix(gamma) + 3 * gamma) & mask) + 8 * gamma) & mask)
    assert uniforms(0, 3, np.array([8]))[0] == ((bits >> 11) + 0.5) / 2**53


def test_numbers_are_uniform_over_positions_seeds_and_streams() -> None:
    one = np.array([5])
    for numbers in (
        uniforms(1, 2, STREAMS),
        np.concatenate([uniforms(1, position, one) for position in range(4000)]),
        np.concatenate([uniforms(seed, 1, one) for seed in range(4000)]),
    ):
        assert ((numbers > 0) & (numbers < 1)).all()
        assert abs(numbers.mean() - 0.5) < 0.02
        assert all(abs((numbers < share).mean() - share) < 0.03 for share in (0.1, 0.25, 0.75, 0.9))


def test_neighbouring_seeds_positions_and_streams_share_no_numbers() -> None:
    rows = [uniforms(seed, position, STREAMS[:500]) for seed in range(4) for position in range(4)]
    assert np.unique(np.concatenate(rows)).size == 16 * 500


def test_noise_is_finite_and_has_the_mean_of_its_distribution() -> None:
    noise = np.concatenate([gumbels(seed, 0, STREAMS) for seed in range(20)])
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.02  # the Euler-Mascheroni constant
