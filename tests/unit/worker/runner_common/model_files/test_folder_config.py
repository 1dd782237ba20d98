"""Settings that transformers 5 writes in its new form are found under the older keys, and the reverse."""

import pytest
from pydantic import JsonValue

from exo.worker.runner_common.model_files.folder_config import inexpressible, normalised, sliding_pattern, wrong_setting

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


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"num_hidden_layers": [2]}, "num_hidden_layers = [2], expected a whole number from 1 to 10000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, expected"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0, expected"),
        ({"num_attention_heads": 4.0}, "num_attention_heads = 4.0, expected a whole number"),
        ({"num_key_value_heads": -1}, "num_key_value_heads = -1, expected"),
        ({"hidden_size": True}, "hidden_size = True, expected"),
        ({"text_config": {"vocab_size": "320"}}, "vocab_size = '320', expected"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5', expected a number from 0 on"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta = inf, expected a number"),
        ({"rope_theta": float("nan")}, "rope_theta = nan, expected"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear', expected an object"),
        ({"quantization": 4}, "quantization = 4, expected an object"),
    ],
)
def test_a_setting_that_no_network_can_have_is_named(config: Json, wrong: str) -> None:
    found = wrong_setting(normalised(config))
    assert found is not None
    assert found.startswith(wrong)


def test_what_real_folders_have_is_left_to_the_library() -> None:
    by_layer: Json = {"num_key_value_heads": [2, 4], "num_attention_heads": [4, 8], "head_dim": None}
    assert wrong_setting(normalised({**by_layer, "rope_scaling": None, "num_hidden_layers": 2})) is None
