"""The check of a GGUF header: sound files pass, and everything else ends in a sentence."""

import re
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exo.convert.gguf_file import MetadataValue
from exo.worker.runner_common.model_files.gguf import TENSOR_TYPES, open_gguf
from exo.worker.runner_common.model_files.header_source import HeaderError
from exo.worker.runner_cuda.loading.gguf_check import check_file
from tests.support.edited_gguf import Edit, rewrite
from tests.support.tiny import Shape, write_gguf

KEY_COUNT, TENSOR_COUNT = 16, 8
"""Where the two counts are in a file."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_gguf(path, Shape())
    return path


def put(form: str, at: int, value: int) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        changed = bytearray(data)
        struct.pack_into(form, changed, at, value)
        return bytes(changed)

    return edit


def after(text: bytes, form: str, skip: int, value: int) -> Callable[[bytes], bytes]:
    """Changes the number that stands ``skip`` bytes behind the first place of ``text``."""

    def edit(data: bytes) -> bytes:
        return put(form, data.index(text) + len(text) + skip, value)(data)

    return edit


def before(text: bytes, value: int) -> Callable[[bytes], bytes]:
    """Changes the length of the string ``text``."""

    def edit(data: bytes) -> bytes:
        return put("<Q", data.index(text) - 8, value)(data)

    return edit


def with_key(data: bytes, key: bytes, kind: int, value: bytes) -> bytes:
    """The file with one more key, the first; the tensors' data then is where nobody looks for it."""
    (count,) = struct.unpack_from("<Q", data, KEY_COUNT)
    return (
        put("<Q", KEY_COUNT, count + 1)(data)[:24]
        + struct.pack("<Q", len(key))
        + key
        + struct.pack("<I", kind)
        + value
        + data[24:]
    )


NORM = b"output_norm.weight"
EPSILON = "llama.attention.layer_norm_rms_epsilon"
LIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "at byte 0"),
    "magic": (lambda data: b"GGML" + data[4:], "begins with b'GGML'"),
    "version 1": (put("<I", 4, 1), "version 0x1"),
    "big-endian": (put(">I", 4, 3), "version 0x3000000"),
    "2^32-1 keys": (put("<Q", KEY_COUNT, (1 << 32) - 1), "4294967295 keys"),
    "negative number of keys": (put("<q", KEY_COUNT, -1), "keys"),
    "negative number of tensors": (put("<q", TENSOR_COUNT, -1), "tensors"),
    "one key too many": (lambda data: put("<Q", KEY_COUNT, data[KEY_COUNT] + 1)(data), "a tensor name of 90,"),
    "one tensor too many": (lambda data: put("<Q", TENSOR_COUNT, data[TENSOR_COUNT] + 1)(data), "tensor"),
    "negative length of a key": (before(b"general.architecture", -1 & (1 << 64) - 1), "a metadata key of 18,446,"),
    "length of a key past the end": (before(b"general.architecture", 1 << 40), "a metadata key of 1,099,"),
    "negative length of a text": (after(b"general.architecture", "<q", 4, -1), "general.architecture"),
    "length of a text near 2^64": (after(b"general.architecture", "<Q", 4, (1 << 64) - 8), "general.architecture"),
    "unknown value type": (after(b"general.architecture", "<I", 0, 99), "value type 99"),
    "array of arrays": (after(b"tokenizer.ggml.tokens", "<I", 4, 9), "value type 9"),
    "array past the end": (after(b"tokenizer.ggml.tokens", "<Q", 8, 1 << 62), "tokenizer.ggml.tokens"),
    "numbers past the end": (after(b"tokenizer.ggml.token_type", "<Q", 8, 1 << 62), "tokenizer.ggml.token_type"),
    "alignment 0": (lambda data: with_key(data, b"general.alignment", 4, bytes(4)), "power of two"),
    "alignment 24": (lambda data: with_key(data, b"general.alignment", 4, struct.pack("<I", 24)), "power of two"),
    "alignment a text": (lambda data: with_key(data, b"general.alignment", 8, bytes(8)), "power of two"),
    "a key twice": (lambda data: with_key(data, b"general.name", 0, b"x"), "the metadata key 'general.name' twice"),
    "a truth value of 7": (lambda data: with_key(data, b"x", 7, b"\7"), "neither 0 nor 1"),
    "a key that is no text": (lambda data: with_key(data, b"\xff", 0, b"x"), "not UTF-8"),
    "half a billion layers": (
        after(b"llama.block_count", "<I", 4, 1 << 29),
        "block_count = 536870912, expected 1 to 512",
    ),
    "no dimensions": (after(NORM, "<I", 0, 0), "0 dimensions"),
    "5 dimensions": (after(NORM, "<I", 0, 5), "5 dimensions"),
    "dimension 0": (after(NORM, "<Q", 4, 0), "with the dimensions [0]"),
    "negative dimension": (after(NORM, "<q", 4, -1), "with the dimensions [18446744073709551615]"),
    "dimension past the end": (after(NORM, "<Q", 4, 1 << 62), "but the file has"),
    "unknown tensor type": (after(NORM, "<I", 12, 4), "tensor type 4"),
    "rows that blocks cannot fill": (lambda data: after(NORM, "<I", 12, 12)(data), "blocks of 256"),
    "offset past the end": (after(NORM, "<Q", 16, 1 << 40), "is cut short: "),
    "negative offset": (after(NORM, "<q", 16, -32), "but the file has"),
    "crooked offset": (after(NORM, "<Q", 16, 33), "no multiple of 32"),
    "tensors on top of each other": (after(b"blk.1.attn_q.weight", "<Q", 24, 0), "within another tensor"),
    "a tensor twice": (lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "twice"),
    "a long name": (before(NORM, 64), "a tensor name of 64 bytes"),
}


def test_sound_files_pass(sound: Path, tmp_path: Path) -> None:
    check_file(sound)
    for dtype in ("F16", "Q8_0", "Q4_0"):
        write_gguf(tmp_path / "other.gguf", Shape(dtype=dtype))
        check_file(tmp_path / "other.gguf")


def test_every_type_that_files_hold_has_the_size_that_gguf_py_says() -> None:
    """But for two that llama.cpp only computes in, and of which gguf-py has one with another size than ggml."""
    known = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if kind.name not in ("Q8_1", "Q8_K")}
    assert known == TENSOR_TYPES


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(sound: Path, tmp_path: Path, lie: str) -> None:
    edit, says = LIES[lie]
    path = tmp_path / "model.gguf"
    path.write_bytes(edit(sound.read_bytes()))
    with pytest.raises(HeaderError) as refusal:
        check_file(path)
    assert says in str(refusal.value)


REFUSED: dict[str, tuple[Mapping[str, MetadataValue | None], str]] = {
    "no layers": ({"llama.block_count": 0}, "block_count = 0, expected 1 to 512"),
    "513 layers": ({"llama.block_count": 513}, "block_count = 513"),
    "epsilon 0": ({EPSILON: 0.0}, f"{EPSILON} = 0.0, expected a positive number"),
    "epsilon below 0": ({EPSILON: -1e-5}, "expected a positive number"),
    "epsilon not a number": ({EPSILON: float("nan")}, f"{EPSILON} = nan"),
    "rotation with a negative base": ({"llama.rope.freq_base": -1.0}, "rope.freq_base = -1.0, expected a number"),
    "rotation with no base": ({"llama.rope.freq_base": float("nan")}, "rope.freq_base = nan"),
    "more experts used": (
        {"llama.expert_count": 2, "llama.expert_used_count": 3},
        "expert_used_count = 3, which is more than the 2 experts",
    ),
    "experts used of none": ({"llama.expert_used_count": 2}, "more than the 0 experts"),
    "no experts used": ({"llama.expert_count": 2}, "expert_used_count = 0"),
    "as many groups as experts": (
        {"llama.expert_count": 2, "llama.expert_used_count": 1, "llama.expert_group_count": 2},
        "expert_group_count = 2 for 2 experts",
    ),
    "groups of unequal size": (
        {"llama.expert_count": 5, "llama.expert_used_count": 1, "llama.expert_group_count": 2},
        "which 2 groups do not divide",
    ),
    "no groups used": (
        {"llama.expert_count": 4, "llama.expert_used_count": 1, "llama.expert_group_count": 2},
        "expert_group_used_count = 0 of 2 groups",
    ),
    "more layers ahead": ({"llama.nextn_predict_layers": 3}, "more than all 2 layers"),
    "rope scaling": ({"llama.rope.scaling.type": "dynamic"}, "rope.scaling.type = 'dynamic'"),
    "nothing rotated": (
        {"llama.rope.dimension_count": 0},
        "rope.dimension_count = 0, expected an even number up to 16",
    ),
    "half a pair rotated": ({"llama.rope.dimension_count": 15}, "rope.dimension_count = 15, expected an even number"),
    "more than a head rotated": ({"llama.rope.dimension_count_swa": 18}, "rope.dimension_count_swa = 18, expected"),
    "heads": ({"llama.attention.head_count_kv": 3}, "attention.head_count_kv does not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_asserts_of_a_model_s_numbers_is_found_before_it_does(
    sound: Path, tmp_path: Path, case: str
) -> None:
    keys, words = REFUSED[case]
    rewrite(sound, tmp_path / "edited.gguf", Edit(keys=keys))
    with pytest.raises(HeaderError, match=re.escape(words)):
        check_file(tmp_path / "edited.gguf")


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn", "longrope"])
def test_known_numbers_pass(sound: Path, tmp_path: Path, scaling: str) -> None:
    keys = {"llama.rope.scaling.type": scaling, "llama.expert_count": 8, "llama.expert_used_count": 2}
    rewrite(sound, tmp_path / "edited.gguf", Edit(keys={**keys, "llama.expert_group_count": 1}))
    check_file(tmp_path / "edited.gguf")


KINDS: dict[str, tuple[Mapping[str, MetadataValue | None], str]] = {
    "adapter": ({"general.type": "adapter"}, "is an adapter (LoRA) of another model"),
    "importance matrix": ({"general.type": "imatrix"}, "is an importance matrix"),
    "projector": ({"general.type": "mmproj"}, "is a projector"),
    "no vocabulary": ({"tokenizer.ggml.model": "none"}, "has no vocabulary"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_gguf_file_that_is_no_model_is_named(sound: Path, tmp_path: Path, case: str) -> None:
    keys, words = KINDS[case]
    rewrite(sound, tmp_path / "edited.gguf", Edit(keys=keys))
    with pytest.raises(HeaderError, match=re.escape(words)):
        check_file(tmp_path / "edited.gguf")


def test_a_vocabulary_without_weights_is_named(sound: Path, tmp_path: Path) -> None:
    tensors = dict.fromkeys((tensor.name for tensor in open_gguf(sound).tensors), None)
    rewrite(sound, tmp_path / "vocabulary.gguf", Edit(tensors=tensors))
    with pytest.raises(HeaderError, match="is a vocabulary without weights"):
        check_file(tmp_path / "vocabulary.gguf")


def test_parts_of_a_split_file_under_another_name_or_joined_into_one(sound: Path, tmp_path: Path) -> None:
    rewrite(sound, tmp_path / "model.gguf", Edit(part_size=8))
    parts = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(parts) > 1
    check_file(parts[0])
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(HeaderError, match=rf"is part 1 of {len(parts)} of a model, .*-00001-of-0000{len(parts)}\.gguf"):
        check_file(renamed)
    renamed.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(HeaderError, match=f"is {len(parts)} parts joined into one file"):
        check_file(renamed)


def test_a_token_that_is_there_twice_is_refused_before_llama_cpp_aborts(sound: Path, tmp_path: Path) -> None:
    field = gguf.GGUFReader(sound).get_field("tokenizer.ggml.tokens")
    assert field is not None
    tokens: list[str] = field.contents()
    path = tmp_path / "doubled.gguf"
    rewrite(sound, path, Edit(keys={"tokenizer.ggml.tokens": [*tokens[:-1], tokens[65]]}))
    with pytest.raises(HeaderError, match=f"the token 'A' in .*tokens twice, as numbers 65 and {len(tokens) - 1}"):
        check_file(path)


def test_a_tokenizer_that_some_texts_would_end_is_refused(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "sentencepiece.gguf"
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    rewrite(sound, path, Edit(keys={"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": spelt}))
    check_file(path)
    rewrite(sound, path, Edit(keys={"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": spelt[:-1]}))
    with pytest.raises(HeaderError, match="has no token for the byte 0xff"):
        check_file(path)


def test_no_beginning_of_a_file_is_a_file(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    path = tmp_path / "model.gguf"
    for length in (*range(0, 4000, 7), *range(4000, len(whole) - 1, 997), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(HeaderError):
            check_file(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=20))
def test_whatever_is_flipped_the_check_passes_or_says_why(
    sound: Path, tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(sound.read_bytes())
    for place, bit in flips:
        data[place % min(len(data), 16_384)] ^= 1 << bit
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with suppress(HeaderError):
        check_file(path)
