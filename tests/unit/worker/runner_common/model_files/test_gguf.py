"""A GGUF file's metadata read from its beginning, whatever the file claims."""

import struct
from pathlib import Path

import gguf
import pytest

from exo.store.discover.description import from_gguf
from exo.worker.runner_common.model_files.gguf import read_gguf
from exo.worker.runner_common.model_files.header_source import HeaderError, LocalHeader
from tests.support.edited_gguf import Edit, rewrite
from tests.support.gguf_bytes import LLAMA, Source, field, header, number, read, text
from tests.support.tiny import Shape, write_gguf


def test_a_real_files_metadata_and_no_byte_after_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Shape(vocabulary=300))
    data = path.read_bytes()
    source = Source(data)
    found = from_gguf(read_gguf(source, tensors=False))
    shape = Shape(vocabulary=300)
    assert (found.architecture, found.n_layers, found.hidden_size) == ("llama", shape.layer_count, shape.hidden)
    assert found.num_key_value_heads == shape.kv_heads
    assert found.task == "TextGeneration"
    assert found.chat_template
    assert source.asked == sorted(source.asked)
    assert source.asked[-1] < data.index(b"token_embd.weight"), "the tensors' table is not asked for"


def test_every_cut_of_a_header_is_told(tmp_path: Path) -> None:
    data = header(*LLAMA, field("x.list", 9, struct.pack("<IQ", 8, 3) + text("a") + text("") + text("b")))
    assert read(data).value("llama.block_count") == 4
    for end in range(4, len(data)):
        with pytest.raises(HeaderError, match=f"at byte {end}"):
            read(data[:end])


def test_names_for_people_hold_nothing_that_a_terminal_obeys() -> None:
    found = from_gguf(read(header(*LLAMA)))
    assert found.name == "A model[2J"
    assert found.context_length == 10_485_760
    assert found.num_key_value_heads is None


@pytest.mark.parametrize(
    ("pooling", "task"), [(0, "TextGeneration"), (1, "TextEmbedding"), (3, "TextEmbedding"), (4, "TextRanking")]
)
def test_what_a_model_is_for(pooling: int, task: str) -> None:
    assert from_gguf(read(header(*LLAMA, number("llama.pooling_type", pooling)))).task == task


def test_of_sizes_for_each_layer_the_largest_counts() -> None:
    heads = field("llama.attention.head_count_kv", 9, struct.pack("<IQ4i", 5, 4, 2, 8, 0, 2))
    assert from_gguf(read(header(*LLAMA, heads))).num_key_value_heads == 8


def test_values_that_nobody_asked_for_are_skipped_whatever_they_are() -> None:
    others = [field(f"other.{kind}", kind, b"\xff" * size) for kind, size in {0: 1, 3: 2, 6: 4, 7: 1, 12: 8}.items()]
    others += [field("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 1000) + b"\0" * 4000)]
    others += [field("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 1000) + text(b"\xff\xfe") * 1000)]
    assert read(header(*others, *LLAMA)).architecture == "llama"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGU", "ends within its header, at byte 3"),
        (b"<!doctype html>", "is not a GGUF file: it is a web page"),
        (header(version=1), "version 0x1; accepted are 2 and 3"),
        (header(claimed=1 << 60), "claims 1152921504606846976 keys and 7 tensors, expected at most 65536"),
        (header(struct.pack("<Q", 1 << 63)), "a metadata key of 9,223,372,036,854,775,808 bytes"),
        (header(field(b"\xff", 4, b"\0" * 4)), "a metadata key that is not UTF-8"),
        (header(field("general.name", 8, struct.pack("<Q", 1 << 40))), "in the value of 'general.name'"),
        (header(field("x", 9, struct.pack("<IQ", 8, 1 << 62))), "ends within its header"),
        (header(field("x", 9, struct.pack("<IQ", 12, 1 << 61))), "ends within its header"),
        (header(field("x", 8, struct.pack("<Q", (1 << 64) - 1))), "ends within its header"),
        (header(field("x", 9, struct.pack("<IQ", 9, 1))), "'x' of the unknown value type 9"),
        (header(field("x", 13, b"")), "'x' of the unknown value type 13"),
        (header(*LLAMA, LLAMA[0]), "the metadata key 'general.architecture' twice"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(HeaderError, match=reason):
        read(data)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((), "general.architecture = '', which is no architecture's name"),
        ((field("general.architecture", 8, text("ll\nama")),), "no architecture's name"),
        ((number("general.architecture", 1),), "general.architecture = 1, expected a string"),
        (LLAMA[:3], "does not say llama.embedding_length"),
        ((*LLAMA[:3], number("llama.embedding_length", 0)), "does not say llama.embedding_length"),
        ((*LLAMA[:3], number("llama.embedding_length", 20_000_000)), "expected a whole number up to 10,000,000"),
        ((*LLAMA[:3], field("llama.embedding_length", 8, text("64"))), "embedding_length = '64', expected a whole"),
        ((*LLAMA, field("general.type", 8, text("mmproj"))), "is no language model, but: mmproj"),
        ((*LLAMA, field("general.type", 8, text("adapter"))), "is no language model, but: adapter"),
    ],
)
def test_metadata_that_no_card_can_be_made_of(fields: tuple[bytes, ...], reason: str) -> None:
    with pytest.raises(HeaderError, match=reason):
        from_gguf(read(header(*fields)))


def test_a_renamed_architecture_keeps_its_own_keys(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", Shape(vocabulary=300))
    rewrite(tmp_path / "tiny.gguf", tmp_path / "other.gguf", Edit(architecture="qwen3"))
    data = (tmp_path / "other.gguf").read_bytes()
    assert from_gguf(read(data)).architecture == "qwen3"


def test_every_value_of_a_file_is_decoded_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Shape(vocabulary=300))
    read_by_gguf_py, found = gguf.GGUFReader(path), read_gguf(LocalHeader(path))
    for key, field_of in read_by_gguf_py.fields.items():
        if not key.startswith("GGUF."):
            value = found.value(key)
            assert (list(value) if isinstance(value, tuple) else value) == field_of.contents(), key
    places = {each.name: (each.data_offset, each.n_bytes, tuple(each.shape)) for each in read_by_gguf_py.tensors}
    assert {each.name: (each.start, each.size, each.shape) for each in found.tensors} == places


def test_a_value_that_is_too_large_is_refused_when_it_is_asked_for() -> None:
    long = field("general.name", 8, text("x" * ((1 << 20) + 1)))
    many = field("llama.attention.head_count_kv", 9, struct.pack("<IQ", 0, 1025) + bytes(1025))
    with pytest.raises(HeaderError, match=r"general\.name of 1,048,577 bytes, expected at most 1,048,576"):
        from_gguf(read(header(LLAMA[0], long, *LLAMA[2:])))
    with pytest.raises(HeaderError, match="head_count_kv' with 1,025 elements, expected at most 1,024"):
        from_gguf(read(header(*LLAMA, many)))


def test_a_header_over_the_limit_is_refused_before_it_is_fetched() -> None:
    source = Source(header(*LLAMA, field("x", 8, text("y" * (2 << 20)))))
    with pytest.raises(HeaderError, match="has a header of more than 1 MiB"):
        read_gguf(source, limit=1 << 20, tensors=False)
    assert source.asked[-1] <= 1 << 20


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(header(*LLAMA))
    source = LocalHeader(path)
    path.write_bytes(header(*LLAMA)[:100])
    with pytest.raises(HeaderError, match="ends within its header, at byte 100"):
        read_gguf(source, tensors=False)
