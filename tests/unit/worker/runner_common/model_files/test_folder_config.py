"""Settings that transformers 5 writes in its new form are found under the older keys, and the reverse."""

import pytest
from pydantic import JsonValue

from exo.worker.runner_common.model_files.folder_config import inexpressible, normalised, sliding_pattern

Json = dict[str, JsonValue]
LLAMA3: Json = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING, FULL = "sliding_attention", "full_attention"


def test_rope_parameters_are_theta_and_scaling() -> None:
    found = normalised({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, **LLAMA3}})
    assert (found["rope_theta"], found["partial_rotary_factor"]) == (5e5, 0.5)
    assert found["rope_scaling"] == {**LLAMA3, "type": "llama3"}


def test_rope_parameters_by_kind_of_layer_are_those_of_gemma_3() -> None:
    by_layer: Json = {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    found = normalised({"rope_parameters": by_layer})
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 1e4)
    assert found["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 8.0}
    assert inexpressible(found) is None


def test_default_positions_need_no_scaling() -> None:
    found = normalised({"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}})
    assert found["rope_scaling"] is None
    assert found["rope_theta"] == 2.0  # as transformers decides between the two


def test_older_settings_are_there_in_the_new_form_too() -> None:
    found = normalised({"rope_theta": 5e5, "rope_scaling": {"type": "su", "short_factor": [1.0]}})
    assert found["rope_parameters"] == {"rope_type": "longrope", "type": "su", "short_factor": [1.0], "rope_theta": 5e5}
    assert normalised({"rope_theta": 5e5})["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}


def test_a_nested_language_model_is_treated_alike() -> None:
    found = normalised({"model_type": "x", "text_config": {"rope_parameters": {"rope_theta": 7.0}}})
    inner = found["text_config"]
    assert isinstance(inner, dict)
    assert inner["rope_theta"] == 7.0


def test_experts_have_two_names() -> None:
    assert normalised({"num_local_experts": 8})["num_experts"] == 8
    assert normalised({"num_experts": 8})["num_local_experts"] == 8
    assert normalised({"num_experts": 8, "num_local_experts": 4}) == {"num_experts": 8, "num_local_experts": 4}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({SLIDING: {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.sliding_attention"),
        ({"chunked_attention": {"rope_type": "default"}}, "rope_parameters.chunked_attention"),
    ],
)
def test_what_older_keys_cannot_express_is_named(part: Json, name: str) -> None:
    assert inexpressible({"rope_parameters": part}) == name


def test_the_order_of_layers_tells_the_pattern_of_windows() -> None:
    assert normalised({"layer_types": [SLIDING, SLIDING, FULL, SLIDING]})["sliding_window_pattern"] == 3
    assert sliding_pattern({"layer_types": [SLIDING, FULL, FULL]}) is None
    assert "sliding_window_pattern" not in normalised({"layer_types": [FULL, FULL]})
