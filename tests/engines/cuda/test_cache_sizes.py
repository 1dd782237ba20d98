"""The KV caches and recurrent states that the estimate counts, against those that llama.cpp allocates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import JsonValue

from exo.convert.gguf_file import MetadataValue
from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import LoadOption
from exo.worker.runner_cuda.loading.estimate import estimate
from tests.support.any_gguf import write_any
from tests.support.engine_memory import context_memory

TOLERANCE = 0.03
Keys = Mapping[str, MetadataValue]
COMMON: Keys = {
    "vocab_size": 320, "context_length": 65536, "embedding_length": 256, "feed_forward_length": 64,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 64, "attention.value_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-6, "attention.layer_norm_epsilon": 1e-6, "attention.sliding_window": 512,
    "rope.dimension_count": 64, "logit_scale": 1.0,
}  # fmt: skip
EXPERTS: Keys = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
GEMMA4: Keys = {
    "attention.sliding_window_pattern": [1, 1, 1, 0, 1, 1, 1, 0], "attention.shared_kv_layers": 4,
    "attention.head_count_kv": [2, 2, 2, 1, 2, 2, 2, 1], "attention.key_length": 192, "attention.value_length": 192,
    "attention.key_length_swa": 64, "attention.value_length_swa": 64, "rope.dimension_count": 192,
    "rope.dimension_count_swa": 64, "embedding_length_per_layer_input": 32,
}  # fmt: skip
COMPRESSED: Keys = {
    "attention.head_count_kv": 1, "attention.q_lora_rank": 64, "attention.kv_lora_rank": 192,
    "attention.key_length": 256, "attention.value_length": 192, "attention.key_length_mla": 96,
    "attention.value_length_mla": 64, "leading_dense_block_count": 1, "expert_shared_count": 1,
    "expert_weights_scale": 1.0, **EXPERTS,
}  # fmt: skip
LINEAR: Keys = {
    "ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 128, "ssm.time_step_rank": 4, "ssm.group_count": 2,
    "rope.dimension_sections": [16, 8, 8, 0],
}  # fmt: skip
SHORT: Keys = {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2, 0, 0, 2, 0]}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    architecture: str
    n_layers: int
    keys: Keys = field(default_factory=dict[str, MetadataValue])
    table: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.architecture}.gguf"
        write_any(path, self.architecture, {**COMMON, "block_count": self.n_layers, **self.keys})
        return path


WINDOWS: Mapping[str, JsonValue] = {"swa_full": False}
CASES = (
    Case("gemma2", "gemma2", 6, table=WINDOWS),
    Case("gemma3", "gemma3", 8, table=WINDOWS),
    Case("gemma3-every-third", "gemma3", 8, {"attention.sliding_window_pattern": 3}, WINDOWS),
    Case("gemma3-full", "gemma3", 8, table={"swa_full": True}),
    Case("gemma3-short", "gemma3", 8, table=WINDOWS | {"n_ctx": 600}),
    Case("gemma3-quantised", "gemma3", 8, table=WINDOWS | {"cache_type_k": "q8_0", "cache_type_v": "q4_0"}),
    Case("gemma3-wide-steps", "gemma3", 8, table=WINDOWS | {"n_ubatch": 2048}),
    Case("gemma3n", "gemma3n", 30, table=WINDOWS),
    Case("gemma4", "gemma4", 8, GEMMA4, WINDOWS),
    Case("gemma4-without-flash-attention", "gemma4", 8, GEMMA4, WINDOWS | {"flash_attn": "off"}),
    Case("gpt-oss", "gpt-oss", 6, EXPERTS, WINDOWS),
    Case("cohere2", "cohere2", 9, table=WINDOWS),
    Case("llama4", "llama4", 8, {**EXPERTS, "interleave_moe_layer_step": 2}, WINDOWS),
    Case("smallthinker", "smallthinker", 8, {**EXPERTS, "expert_gating_func": 2}, WINDOWS | {"n_ctx": 32768}),
    Case("a-window-that-llama.cpp-ignores", "phi3", 32, table=WINDOWS),
    Case("a-pool", "llama", 4, table={"kv": "pool"}),
    Case("compressed-keys", "deepseek2", 4, COMPRESSED),
    Case("hybrid-by-interval", "qwen35", 8, LINEAR),
    Case("hybrid-with-a-layer-ahead", "qwen35", 9, {**LINEAR, "nextn_predict_layers": 1}),
    Case("hybrid-by-heads", "lfm2", 6, {**SHORT, "attention.sliding_window": 0}),
    Case("hybrid-with-windows", "lfm2", 6, SHORT, WINDOWS),
    Case("hybrid-by-interval-guessing", "qwen35", 8, LINEAR, {"speculate": 6}),
    Case("hybrid-by-heads-guessing", "lfm2", 6, {**SHORT, "attention.sliding_window": 0}, {"speculate": "auto"}),
    Case("both-in-each-layer", "falcon-h1", 3, LINEAR),
    Case("recurrent", "mamba2", 3, {**LINEAR, "attention.head_count": 0, "attention.head_count_kv": 0}),
    Case("both-in-each-layer-without-rollback", "falcon-h1", 3, LINEAR, {"speculate": 4}),
)


def load(path: Path, **table: JsonValue) -> Load:
    own = {"path": str(path), "threads": 1, "slots": 3, "n_ctx": 16384, "prefix_cache_bytes": 0}
    return Load(model_id="test/any", backend="LlamaCppCpu", table=own | table)


def planned(command: Load) -> LoadOption:
    return estimate(Estimate(load=command)).choices[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_caches_are_counted_as_llama_cpp_allocates_them(tmp_path: Path, case: Case) -> None:
    command = load(case.write(tmp_path), **case.table)
    allocated = context_memory(command).cache
    assert planned(command).parts["KV cache"] == pytest.approx(allocated, rel=TOLERANCE)


@pytest.mark.parametrize("swa_full", [False, True])
def test_the_cache_for_texts_is_counted_too(tmp_path: Path, swa_full: bool) -> None:
    keys: Keys = {"attention.sliding_window": 64, "attention.key_length": 256, "attention.value_length": 256}
    path = Case("gemma3", "gemma3", 8, keys).write(tmp_path)
    command = load(path, swa_full=swa_full, embedding_ctx=16384, n_ubatch=32)
    memory = context_memory(command)
    assert planned(command).parts["embedding"] == pytest.approx(memory.text_cache + memory.text_compute, rel=TOLERANCE)


def test_small_windows_leave_room_for_a_longer_context(tmp_path: Path) -> None:
    path = Case("gpt-oss", "gpt-oss", 6, EXPERTS).write(tmp_path)
    longest = list[int]()
    for swa_full in (True, False):
        choices = estimate(Estimate(load=load(path, n_ctx="auto", swa_full=swa_full))).choices
        longest.append(max(int(str(each.settings["n_ctx"])) for each in choices if each.host <= 200 << 20))
    full, windows = longest
    assert windows > 1.4 * full


def test_the_free_memory_decides_the_size_of_the_prefix_cache_and_the_least_is_worth_unloading_others(
    tmp_path: Path,
) -> None:
    path = CASES[0].write(tmp_path)
    found = estimate(Estimate(load=load(path, n_ctx=1024, prefix_cache_bytes=None)))
    sizes = [int(str(each.settings["prefix_cache_bytes"])) for each in found.choices]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[found.enough] == 256 << 20
    assert all(size <= 4 << 30 for size in sizes)
    none = planned(load(path, n_ctx=1024))
    assert [each.later_host - none.later_host for each in found.choices] == sizes
