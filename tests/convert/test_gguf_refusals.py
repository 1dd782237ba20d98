"""GGUF files that cannot be converted are refused by name, and nothing is left behind."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.converted import make_twins, refuse
from tests.support.edited_gguf import Edit, rewrite

ZEROS = np.zeros(64, np.float32)
TOKENS = ["a", "b", "a"]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_twins(tmp_path_factory.mktemp("twins"))


@pytest.mark.parametrize(
    ("architecture", "edit", "message"),
    [
        ("llama", Edit(architecture="mamba"), "general.architecture: 'mamba' cannot be converted; accepted: llama, q"),
        ("llama", Edit(keys={"llama.block_count": None}), "llama.block_count: this metadata key is missing"),
        ("llama", Edit(keys={"llama.block_count": "two"}), "llama.block_count: is 'two', expected a whole number"),
        ("llama", Edit(keys={"llama.block_count": 2**31 - 1}), "llama.block_count: is 2147483647, but the file holds"),
        ("llama", Edit(keys={"llama.block_count": 1}), "blk.1.attn_k.weight: no such tensor is known in a llama model"),
        ("llama", Edit(keys={"llama.block_count": 3}), "blk.2.attn_q.weight: this tensor of a llama model is missing"),
        ("llama", Edit(keys={"llama.attention.head_count": 2}), "blk.0.attn_q.weight: has shape 64x64, expected 32x64"),
        ("llama", Edit(keys={"llama.attention.head_count_kv": 3}), "key/value heads: 3 does not divide the 4 heads"),
        ("llama", Edit(keys={"llama.attention.value_length": 8}), "llama.attention.value_length: is 8, expected 16"),
        ("llama", Edit(keys={"llama.rope.dimension_count": 8}), "llama.rope.dimension_count: is 8, expected 16"),
        ("llama", Edit(keys={"llama.attention.layer_norm_rms_epsilon": float("nan")}), "llama.attention.layer_norm_rm"),
        ("llama", Edit(keys={"llama.expert_count": 8}), "llama.expert_count: is 8, expected 0"),
        ("llama", Edit(keys={"llama.attention.scale": 0.5}), "llama.attention.scale: this metadata key is not known"),
        ("llama", Edit(keys={"llama.rope.scaling.type": "yarn"}), "llama.rope.scaling.type: is 'yarn', expected 'no"),
        ("gemma3", Edit(keys={"gemma3.attention.sliding_window": None}), "gemma3.attention.sliding_window: this meta"),
        ("gemma3", Edit(keys={"gemma3.final_logit_softcapping": 30.0}), "gemma3.final_logit_softcapping: is 30.0, e"),
        ("llama", Edit(tensors={"blk.0.ffn_up.weight": None}), "blk.0.ffn_up.weight: this tensor of a llama model is"),
        ("llama", Edit(tensors={"blk.0.attn_q.bias": ZEROS}), "blk.0.attn_q.bias: no such tensor is known in a llama"),
        ("qwen2", Edit(tensors={"blk.0.attn_q_norm.weight": ZEROS}), "blk.0.attn_q_norm.weight: no such tensor is kn"),
        ("llama", Edit(tensors={"blk.0.attn_norm.weight": ZEROS[:32]}), "blk.0.attn_norm.weight: has shape 32, expect"),
        ("llama", Edit(tensors={"blk.0.attn_norm.weight": ZEROS.astype(np.int32)}), "blk.0.attn_norm.weight: is store"),
        ("llama", Edit(tensors={"rope_freqs.weight": ZEROS[:8] + 3}), "rope_freqs.weight: holds rotary factors that"),
        ("llama", Edit(tensors={"rope_freqs.weight": ZEROS[:4]}), "rope_freqs.weight: has shape (4,), expected (8,)"),
        ("qwen3", Edit(tensors={"rope_freqs.weight": ZEROS[:8] + 1}), "rope_freqs.weight: no such tensor is known in"),
        ("llama", Edit(keys={"tokenizer.ggml.suppress_tokens": [5]}), "tokenizer.ggml.suppress_tokens: this meta"),
        ("llama", Edit(keys={"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model: is 'bert'; accepted: gpt2 and l"),
        ("llama", Edit(keys={"tokenizer.ggml.pre": "chatglm-bpe"}), "tokenizer.ggml.pre: is 'chatglm-bpe'; accepted:"),
        ("llama", Edit(keys={"tokenizer.ggml.pre": None}), "tokenizer.ggml.pre: this metadata key is missing"),
        ("llama", Edit(keys={"tokenizer.ggml.merges": ["ab"]}), "tokenizer.ggml.merges: holds 'ab', expected two tok"),
        (
            "llama",
            Edit(keys={"tokenizer.ggml.merges": ["a zz"]}),
            "tokenizer.ggml.merges: 'a' and 'zz' need 'zz', which is no token",
        ),
        ("llama", Edit(keys={"tokenizer.ggml.tokens": None}), "tokenizer.ggml.tokens: this metadata key is missing"),
        ("llama", Edit(keys={"tokenizer.ggml.token_type": [1]}), "tokenizer.ggml.token_type: is an array of 1, expec"),
        ("llama", Edit(keys={"tokenizer.ggml.token_type": [9] * 320}), "tokenizer.ggml.token_type: holds 9; accept"),
        ("llama", Edit(keys={"tokenizer.ggml.eos_token_id": 320}), "tokenizer.ggml.eos_token_id: is 320, but the"),
        ("llama", Edit(keys={"llama.vocab_size": 319}), "llama.vocab_size: is 319, expected 320"),
        (
            "llama",
            Edit(keys={"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [1] * 3, "llama.vocab_size": 3}),
            "tokenizer.ggml.tokens: 'a' is two tokens",
        ),
    ],
)
def test_a_gguf_model_that_cannot_be_said_otherwise(
    twins: Path, tmp_path: Path, architecture: str, edit: Edit, message: str
) -> None:
    rewrite(twins / f"{architecture}.gguf", tmp_path / "model.gguf", edit)
    refuse(tmp_path / "model.gguf", tmp_path / "out", message)


def test_a_type_that_gguf_py_cannot_dequantise(twins: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_1
    raw = np.zeros((64, 128 // 32 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    rewrite(twins / "llama.gguf", tmp_path / "model.gguf", Edit(raw={"blk.1.ffn_down.weight": (raw, kind)}))
    refuse(
        tmp_path / "model.gguf",
        tmp_path / "out",
        "model.gguf: has 'blk.1.ffn_down.weight' of the unknown tensor type 9",
    )


def header(key_count: int, tensor_count: int, rest: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensor_count, key_count) + rest


def name(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(dimensions: list[int], kind: int, offset: int, called: bytes = b"t") -> bytes:
    return name(called) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


HUGE = 2**63
ENDS = "f.gguf: ends within its header"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ENDS),
        (b"GGUF", ENDS),
        (b"PK\x03\x04" * 9, "f.gguf: is not a GGUF file"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "f.gguf: is GGUF version 0x3000000; accepted are 2 and 3"),
        (header(HUGE, 0, b""), f"f.gguf: claims {HUGE} keys and 0 tensors"),
        (header(0, HUGE, b""), f"f.gguf: claims 0 keys and {HUGE} tensors"),
        (header(1, 0, struct.pack("<Q", HUGE)), "f.gguf: has a metadata key of 9,223,372,036,854,775,808 bytes"),
        (header(1, 0, name(b"\xff") + bytes(20)), "f.gguf: has a metadata key that is not UTF-8"),
        (header(1, 0, name(b"k") + struct.pack("<I", 99)), "f.gguf: has 'k' of the unknown value type 99"),
        (header(1, 0, name(b"k") + struct.pack("<IQ", 8, HUGE)), ENDS),
        (header(1, 0, name(b"k") + struct.pack("<IIQ", 9, 4, HUGE)), ENDS),
        (header(1, 0, name(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), ENDS),
        (
            header(1, 0, name(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99)),
            "f.gguf: has 'k' of the unknown value type 9",
        ),
        (header(2, 0, 2 * (name(b"k") + struct.pack("<II", 4, 1))), "f.gguf: has the metadata key 'k' twice"),
        (header(0, 1, tensor([], 0, 0)), "f.gguf: has 't' with 0 dimensions, expected 1 to 4"),
        (header(0, 1, name(b"t") + struct.pack("<I", 2**31) + bytes(64)), "f.gguf: has 't' with 2147483648 dimensions"),
        (header(0, 1, tensor([0], 0, 0)), "f.gguf: has 't' with the dimensions [0]"),
        (header(0, 1, tensor([4], 77, 0)), "f.gguf: has 't' of the unknown tensor type 77"),
        (header(0, 1, tensor([33], 8, 0)), "f.gguf: has 't' with rows of 33, which blocks of 32 cannot fill"),
        (header(0, 1, tensor([2**62, 4], 0, 0)), "f.gguf: has 't' up to byte 7378697629483820"),
        (header(0, 1, tensor([4], 0, HUGE)), "f.gguf: has 't' up to byte 9223372036854775888, but the file has"),
        (
            header(0, 2, tensor([4], 0, 0) + tensor([4], 0, 0, b"u") + bytes(99)),
            "f.gguf: has 'u' at offset 0, within an",
        ),
        (header(0, 2, tensor([4], 0, 0) + tensor([4], 0, 32) + bytes(99)), "f.gguf: has the tensor 't' twice"),
    ],
)
def test_a_broken_gguf_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f.gguf").write_bytes(content)
    refuse(tmp_path / "f.gguf", tmp_path / "out", message)


def test_a_gguf_file_cut_short_anywhere(twins: Path, tmp_path: Path) -> None:
    whole = (twins / "qwen2.gguf").read_bytes()
    for size in range(1, len(whole), len(whole) // 150):
        (tmp_path / "f.gguf").write_bytes(whole[:size])
        refuse(tmp_path / "f.gguf", tmp_path / "out", "")


def test_a_split_gguf_model_with_a_file_missing_or_renamed(twins: Path, tmp_path: Path) -> None:
    rewrite(twins / "llama.gguf", tmp_path / "m.gguf", Edit(part_size=8))
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "other.gguf")
    refuse(tmp_path / "m-00001-of-00003.gguf", tmp_path / "out", f"{tmp_path / 'm-00002-of-00003.gguf'}: no such file")
    refuse(tmp_path / "other.gguf", tmp_path / "out", "split.tensors.count: is 21, but the files hold 8 tensors")
