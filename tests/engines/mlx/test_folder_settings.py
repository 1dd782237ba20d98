"""What config.json and the index say reaches MLX, or is an error that names it."""

import json
from collections.abc import Sequence
from importlib import import_module
from math import cos, sin
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from pydantic import JsonValue
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from exo.worker.protocol.commands import Load, Text
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.scoring import LogProbabilities
from exo.worker.runner_mlx.loading.loader import check
from exo.worker.runner_mlx.loading.positions import Rotation, WantedPositions, apply
from exo.worker.runner_mlx.score import open_reader
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.shape import Architecture

Json = dict[str, JsonValue]
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3: Json = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR: Json = {"rope_type": "linear", "factor": 4.0}
DIFFERENT = 0.1
"""The least difference of two log-probabilities that rounding does not explain."""


def edit(folder: Path, changes: Json, removed: Sequence[str] = ()) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))


def load_of(folder: Path, **table: JsonValue) -> Load:
    return Load(model_id="test/tiny", backend="MlxCpu", table={"path": str(folder), **table})


def computed(folder: Path, **table: JsonValue) -> LogProbabilities:
    """The log-probabilities after each token of a text that is long enough for positions to matter."""
    reader = open_reader(load_of(folder, **table))
    text = Text(text="once upon a time there was a little model that counted " * 2)
    return reader.read(tuple(reader.tokenizer.encode((text,))))


OLDER_AND_NEWER: dict[str, tuple[Architecture, Json, Json]] = {
    "llama theta": ("llama", {"rope_theta": 77.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "llama scaling": (
        "llama",
        {"rope_theta": 77.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 77.0, **LLAMA3}},
    ),
    "qwen2": (
        "qwen2",
        {"rope_theta": 77.0, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 77.0, **LINEAR}},
    ),
    "qwen3": (
        "qwen3",
        {"rope_theta": 77.0, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 77.0, **LINEAR}},
    ),
    "gemma3": (
        "gemma3",
        {"rope_theta": 777.0, "rope_local_base_freq": 77.0, "rope_scaling": LINEAR, "sliding_window_pattern": 3},
        {
            "rope_parameters": {
                FULL: {"rope_theta": 777.0, **LINEAR},
                SLIDING: {"rope_theta": 77.0, "rope_type": "default"},
            },
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        },
    ),
}


@pytest.mark.parametrize("case", OLDER_AND_NEWER)
def test_a_folder_of_transformers_5_computes_what_one_of_transformers_4_does(tmp_path: Path, case: str) -> None:
    architecture, older, newer = OLDER_AND_NEWER[case]
    own = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")
    for name, settings in (("plain", {}), ("older", older), ("newer", newer)):
        write_mlx(tmp_path / name, Shape(architecture))
        if settings:
            edit(tmp_path / name, {}, removed=own)
            edit(tmp_path / name, settings)
    older, newer, plain = (computed(tmp_path / name) for name in ("older", "newer", "plain"))
    assert np.array_equal(newer, older)
    assert np.abs(plain - older).max() > DIFFERENT


UNREAD: dict[str, tuple[Architecture, Json]] = {
    "partial_rotary_factor": ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "rope_scaling.attention_factor": ("llama", {"rope_scaling": {**LINEAR, "attention_factor": 1.5}}),
    "rope_parameters": (
        "gemma3",
        {"rope_parameters": {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4, **LINEAR}}},
    ),
    "layer_types": ("gemma3", {"layer_types": [SLIDING, FULL, FULL, FULL, SLIDING, FULL]}),
    "final_logit_softcapping": ("gemma3", {"final_logit_softcapping": 30.0}),
    "attention_multiplier": ("qwen2", {"attention_multiplier": 0.5}),
    "use_sliding_window": ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
}


@pytest.mark.parametrize("key", UNREAD)
def test_a_setting_that_mlx_would_ignore_is_named(tmp_path: Path, key: str) -> None:
    architecture, settings = UNREAD[key]
    write_mlx(tmp_path, Shape(architecture))
    check(load_of(tmp_path))
    edit(tmp_path, settings)
    with pytest.raises(LoadError, match=f"has {key} = ") as refusal:
        check(load_of(tmp_path))
    assert f"[mlx] ignored_settings = ['{key}']" in str(refusal.value)
    check(load_of(tmp_path, ignored_settings=[key]))


def as_phi3(folder: Path) -> None:
    """Rewrites a llama as the phi3 that computes the same: its matrices are stored together."""
    weights = load_file(folder / "model.safetensors")
    for layer in {name.split(".self_attn")[0] for name in weights if ".self_attn" in name}:
        for joined, parts in (("self_attn.qkv", ("self_attn.q", "self_attn.k", "self_attn.v")), GATE_UP):
            names = [f"{layer}.{part}_proj.weight" for part in parts]
            weights[f"{layer}.{joined}_proj.weight"] = np.concatenate([weights.pop(name) for name in names])
    save_file(weights, folder / "model.safetensors")
    edit(folder, {"model_type": "phi3", "pad_token_id": 0}, removed=("head_dim", "attention_bias"))


GATE_UP = ("mlp.gate_up", ("mlp.gate", "mlp.up"))
TWICE: Json = {
    "short_factor": [*[2.0] * 8], "long_factor": [*[9.0] * 8], "original_max_position_embeddings": 4096,
}  # fmt: skip
"""In the original context, which is the default one here, the same as linear scaling by 2."""


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_positions_that_mlx_would_compute_in_another_way_are_computed(tmp_path: Path, kind: str) -> None:
    """mlx-lm takes the long factors in every context, and no factors where an early phi3 calls them yarn."""
    scalings: dict[str, Json] = {"llama": {"type": "linear", "factor": 2.0}, "phi3": {"type": kind, **TWICE}}
    for name, scaling in scalings.items():
        write_mlx(tmp_path / name, Shape())
        edit(tmp_path / name, {"rope_scaling": scaling})
    as_phi3(tmp_path / "phi3")
    expected = computed(tmp_path / "llama")
    assert np.abs(computed(tmp_path / "phi3") - expected).max() < 1e-3
    ignored = computed(tmp_path / "phi3", ignored_settings=["rope_scaling"])
    assert np.abs(ignored - expected).max() > DIFFERENT


def test_a_part_of_each_head_is_rotated_where_mlx_rotates_whole_heads() -> None:
    glm: Json = {
        "model_type": "glm", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 320,
    }  # fmt: skip
    kind = import_module("mlx_lm.models.glm")
    network = kind.Model(kind.ModelArgs.from_dict(glm))
    half = Rotation(tuple(1e4 ** (-pair / 4) for pair in range(4)))
    apply(network, WantedPositions(half, unread=False, refusal=LoadError("model_load_failed", "differs")))
    turned = network.layers[0].self_attn.rope(mx.ones((1, 1, 1, 16)), offset=3)[0, 0, 0].tolist()
    expected = [
        each for angle in half.angles for each in (cos(3 * angle) - sin(3 * angle), sin(3 * angle) + cos(3 * angle))
    ]
    assert turned == pytest.approx([*expected, *[1.0] * 8], abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_dropout": 0.1, "initializer_range": 0.02, "pretraining_tp": 2, "unsloth_fixed": True},
        {"mlp_bias": False, "hidden_act": None, "rope_scaling": None, "id2label": {"0": "a"}},
        {"vision_config": {"a": 1}, "auto_map": {"AutoModel": "a.B"}, "dtype": "bfloat16", "_attn": "sdpa"},
        {"layer_types": [FULL, FULL], "cache_implementation": "hybrid", "rope_parameters": {"rope_theta": 1e4}},
    ],
)
def test_settings_that_change_nothing_are_no_reason_to_refuse(tmp_path: Path, settings: Json) -> None:
    write_mlx(tmp_path, Shape())
    edit(tmp_path, settings)
    check(load_of(tmp_path))


@pytest.mark.parametrize("kind", ["mistral", "ministral3"])
def test_a_window_that_mlx_does_not_have_limits_the_context(tmp_path: Path, kind: str) -> None:
    write_mlx(tmp_path, Shape())
    edit(tmp_path, {"model_type": kind, "sliding_window": 1024})
    assert check(load_of(tmp_path)).n_ctx == 1024
    with pytest.raises(LoadError, match="n_ctx may be at most 1024"):
        check(load_of(tmp_path, n_ctx=2048))
    assert check(load_of(tmp_path, n_ctx=2048, ignored_settings=["sliding_window"])).n_ctx == 2048


def test_only_the_files_of_the_index_are_loaded_and_the_log_says_what_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_mlx(tmp_path / "alone", Shape())
    expected = computed(tmp_path / "alone")
    write_mlx(tmp_path / "many", Shape())
    weights = load_file(tmp_path / "many" / "model.safetensors")
    (tmp_path / "many" / "model.safetensors").unlink()
    files = {name: f"part-{'ab'[index % 2]}.safetensors" for index, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in files if files[name] == file}, tmp_path / "many" / file)
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    strays = {"model-00001-of-00001": {name: -array for name, array in weights.items()}}
    for name, tensors in {**strays, "model": {"another": weights["model.norm.weight"]}}.items():
        save_file(tensors, tmp_path / "many" / f"{name}.safetensors")
    assert np.array_equal(computed(tmp_path / "many"), expected)
    told = capfd.readouterr().err
    assert told.count("not loaded: model-00001-of-00001.safetensors, model.safetensors") == 1
