"""Rotary embeddings by a configuration: the angles that transformers computes, and None for what is not known."""

import pytest
from pydantic import JsonValue

from exo.worker.runner_mlx.loading.positions import rotation

Json = dict[str, JsonValue]
SIZES: Json = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}
YARN: Json = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LONG: Json = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 1024,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0],
}  # fmt: skip
LLAMA3: Json = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024, "rope_theta": 5e5,
}  # fmt: skip
OPENAI: Json = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "rope_theta": 150000.0,
    "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip

# The numbers are those of transformers 5.19, ROPE_INIT_FUNCTIONS in modeling_rope_utils.py.
EXPECTED: dict[str, tuple[Json, int, list[float], float]] = {
    "linear, half of each head": (
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        4096,
        [0.25, 0.025, 0.0025, 0.00025],
        1.0,
    ),
    "yarn": (YARN, 4096, [1, 0.237171, 0.05, 0.00790569, 0.0025, 0.000790569, 0.00025, 7.90569e-05], 1.138629),
    "yarn with its own attention factor": (
        {**YARN, "attention_factor": 1.5},
        4096,
        [1, 0.237171, 0.05, 0.00790569, 0.0025, 0.000790569, 0.00025, 7.90569e-05],
        1.5,
    ),
    "yarn with a range that is not rounded": (
        OPENAI,
        4096,
        [1, 0.225418, 0.0508133, 0.00679496, 0.000456484, 1.81883e-05, 4.09998e-06, 9.24209e-07],
        1.346574,
    ),
    "llama3": (LLAMA3, 4096, [1, 0.193923, 0.037606, 0.00131257, 0.000176777, 3.4281e-05, 6.64787e-06, 1.28917e-06], 1),
    "longrope in the original context": (
        LONG,
        1024,
        [1, 0.28748, 0.0833333, 0.0243252, 0.00714286, 0.00210819, 0.000625, 0.000186016],
        1.095445,
    ),
    "longrope beyond it": (
        LONG,
        1025,
        [0.25, 0.0632456, 0.0166667, 0.00451754, 0.00125, 0.000351364, 0.0001, 2.8748e-05],
        1.095445,
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_the_angles_are_those_of_transformers(case: str) -> None:
    rope, n_ctx, angles, factor = EXPECTED[case]
    found = rotation({**SIZES, **rope, "rope_parameters": rope}, n_ctx)
    assert found is not None
    assert found.angles == pytest.approx(angles, rel=1e-5)
    assert found.factor == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_type": "mrope", "rope_theta": 1e4},
        {**YARN, "alpha": 2.0},
        {"full_attention": YARN},
        {**YARN, "factor": None},
        {**YARN, "factor": "4"},
        {**LONG, "short_factor": [1.0]},
    ],
)
def test_what_is_not_known_is_left_to_the_engine(rope: JsonValue) -> None:
    assert rotation({**SIZES, "rope_parameters": rope}, 1024) is None
