"""The MLX runner's tokenizer: the bytes of tokens spell the text, in both of the alphabets that models use."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from exo.worker.protocol.commands import Text
from exo.worker.runner_common.hf_tokenizer import TransformersTokenizer
from exo.worker.runner_common.model_files.model_folder import read_folder
from exo.worker.runner_mlx.model import open_tokenizer
from tests.support.tiny import Shape, write_mlx

Json = dict[str, JsonValue]

TEXT = "naïve  café\n\t你好 😀👩‍👩‍👧 <|im_end|> ▁Ġ <0x41>!"


def sentencepiece() -> Json:
    """Gemma's scheme in small: a space is "▁", and what has no token of its own is spelt in bytes."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the")]
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(left + right for left, right in merges)]
    vocabulary: Json = {name: number for number, name in enumerate(names)}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(names) + index,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
            for index, (content, special) in enumerate([("<bos>", True), ("<|im_end|>", True), ("added ▁", False)])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [len(names)], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [list(merge) for merge in merges],
        },
    }


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_mlx(folder, Shape())
    if request.param == "sentencepiece":
        (folder / "tokenizer.json").write_text(json.dumps(sentencepiece()))
        config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = open_tokenizer(read_folder(folder), [])
    return TransformersTokenizer(found, 400, found.eos_token_ids)


def spelt(tokenizer: TransformersTokenizer, tokens: list[int]) -> bytes:
    return b"".join(tokenizer.bytes_of(token) for token in tokens)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.just(TEXT), st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=40)))
def test_the_bytes_of_a_text_s_tokens_are_the_text_s(tokenizer: TransformersTokenizer, text: str) -> None:
    expected = text.replace("▁", " ") if tokenizer.adds_bos else text
    assert spelt(tokenizer, tokenizer.encode((Text(text=text),))) == expected.encode()


def test_control_tokens_come_from_special_text_only_and_spell_nothing(tokenizer: TransformersTokenizer) -> None:
    [plain, special] = (tokenizer.encode((Text(text="<|im_end|>", special=flag),)) for flag in (False, True))
    assert special[-1] not in plain
    assert spelt(tokenizer, special) == b""
    assert tokenizer.is_eog(special[-1])
    assert "<|im_end|>" in tokenizer.special
    assert tokenizer.is_control(special[-1])
    assert tokenizer.piece_of(special[-1]) == b"<|im_end|>"
    assert not any(tokenizer.is_control(token) for token in plain if token != tokenizer.bos)


def test_a_token_id_that_only_pads_the_vocabulary_spells_nothing(tokenizer: TransformersTokenizer) -> None:
    assert tokenizer.bytes_of(399) == tokenizer.piece_of(399) == b""
    assert not tokenizer.is_control(399)


def test_bos_is_put_in_front_where_the_tokenizer_s_own_template_does(tokenizer: TransformersTokenizer) -> None:
    if not tokenizer.adds_bos:
        assert tokenizer.encode((Text(text="a"),)) == [97]
        return
    assert tokenizer.bos is not None
    bare = tokenizer.encode((Text(text="a"),))
    assert bare[0] == tokenizer.bos
    assert tokenizer.encode((Text(text="<bos>", special=True), Text(text="a"))) == bare
    assert tokenizer.encode((Text(text=""), Text(text=""))) == [tokenizer.bos]


def test_a_token_that_was_added_and_is_no_control_token_spells_itself(tokenizer: TransformersTokenizer) -> None:
    if tokenizer.adds_bos:
        assert spelt(tokenizer, tokenizer.encode((Text(text="a added ▁ a"),))) == "a added ▁ a".encode()
