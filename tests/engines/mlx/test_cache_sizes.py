"""The KV caches that the estimate counts, against the arrays that the runner allocates."""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from pydantic import JsonValue

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.runner_mlx.loading.estimate import estimate
from exo.worker.runner_mlx.loading.loader import check, open_model
from exo.worker.runner_mlx.model import mlx_lm, wait_for
from tests.support.tiny import Shape, write_mlx

SIZES: Mapping[str, JsonValue] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "sliding_window": 64, "torch_dtype": "float32",
}  # fmt: skip
EXPERTS: Mapping[str, JsonValue] = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: Mapping[str, Mapping[str, JsonValue]] = {
    "gemma3_text": {"sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    "gpt_oss": {**EXPERTS, "rope_theta": 10000},
    "cohere2": {"sliding_window_pattern": 3, "rms_norm_eps": None},
    # The last two layers use the keys and values of the first four, and every third layer has larger heads.
    "gemma4_text": {
        "global_head_dim": 32, "num_global_key_value_heads": 1, "num_kv_shared_layers": 2, "sliding_window_pattern": 3,
        "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "final_logit_softcapping": 30.0,
    },
    # Keys and values are stored compressed.
    "glm4_moe_lite": {
        "kv_lora_rank": 64, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "num_key_value_heads": 4, "rope_theta": 10000, "sliding_window": None,
    },
}  # fmt: skip


def write(folder: Path, kind: str) -> Path:
    """Writes a model of any kind that mlx-lm has, with its own random weights."""
    write_mlx(folder, Shape("qwen2"))
    config = {**SIZES, **KINDS[kind], "model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    network, arguments = mlx_lm._get_classes(config)
    network(arguments.from_dict(config)).save_weights(str(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_counted_as_it_is_allocated(tmp_path: Path, kind: str) -> None:
    table: dict[str, JsonValue] = {"path": str(write(tmp_path, kind)), "n_ctx": 2048, "slots": 3, "dtype": "float32"}
    command = Load(model_id="test/any", backend="MlxCpu", table=table)
    model, cache = open_model(check(command), lambda _done, _layers: None, None)
    wait_for(model.forward(mx.array([[1, 2, 3]]), cache, [0], [0]))
    allocated = sum(array.nbytes for array in cache.arrays())
    assert estimate(Estimate(load=command)).choices[0].parts["KV cache"] == allocated
