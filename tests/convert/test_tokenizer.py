"""Tokenizers give the same tokens on both sides of a conversion, as llama.cpp and Hugging Face's library say."""

from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import pytest
from pydantic import JsonValue

from exo.convert import convert
from tests.support.converted import Said, ask_both, change_json, config, question
from tests.support.sentencepiece import RUNS, SPACE, added_token, write_sentencepiece
from tests.support.tiny import Shape, write_mlx
from tests.support.tiny.texts import TEXTS

MORE_TEXTS = [
    *TEXTS,
    "  two and   three    spaces ",
    "12345 1 23 456, 7890\n\n\n12",
    "we'll WE'LL don't I'LL\n \n x",
    "line\r\n\r\nend\t\ttabs   \n",
    "aaaaaaaaaaa aaaa baaab hello hellohello",
    "<s>the</s> <bos> the and then <0x41> <unk>",
    "\ufdfa \ua66e \U0001d518 \u0001\u07ff",
]
# llama_engine makes room for as many tokens as there are bytes, which a space in front may exceed.
MERGED_TEXTS = [f"{text} hello and the" for text in MORE_TEXTS]


def said_about(folder: Path, target: Path, texts: list[str]) -> tuple[Said, Said]:
    """The engines about ``folder`` and the GGUF file made of it, and about the folder made of that file again."""
    convert(folder, target / "model.gguf", to="gguf", dtype="f32")
    convert(target / "model.gguf", target / "back", to="mlx", dtype="f32")
    questions = [question(target / "model.gguf", each, target) for each in (folder, target / "back")]
    for each in questions:
        each["texts"] = texts
    there, back = ask_both(questions)
    return there, back


def tokenize_alike(there: Said, back: Said) -> bool:
    return there.llama["plain"] == there.mlx["plain"] == back.mlx["plain"] and (
        there.llama["special"] == there.mlx["special"] == back.mlx["special"]
    )


def metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES: JsonValue = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS: JsonValue = {"type": "Digits", "individual_digits": True}


def split(numbers: str) -> JsonValue:
    pattern: JsonValue = {"Regex": f"{CONTRACTIONS}|{numbers}|{REST}"}
    cut: JsonValue = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    plain: JsonValue = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [cut, plain]}


BYTE_LEVEL: dict[str, dict[str, JsonValue]] = {
    "gpt-2": {"pre_tokenizer": BYTES},
    "llama-bpe": {"pre_tokenizer": split(r"\p{N}{1,3}")},
    "qwen2": {"pre_tokenizer": split(r"\p{N}"), "normalizer": {"type": "NFC"}},
    "smollm": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}},
}
"""By llama.cpp's name, as released models have it."""

MERGES = "1 2,12 3,123 4,3 4,34 5,Ġ Ġ,ĠĠ Ġ,Ċ Ċ,ĊĊ Ċ,č Ċ,' l,'l l,' L,'L L,Ġ 1,Ġ Ċ,Ċ Ġ,ĉ ĉ"
"""Of digits, spaces, line ends and contractions, where pre-tokenizers differ."""


def write_byte_level(folder: Path, name: str) -> None:
    """A twin whose last merges are those."""
    write_mlx(folder, Shape())
    pairs = [merge.split(" ") for merge in MERGES.split(",")]
    model = config(folder, "tokenizer.json")["model"]
    kept = len(model["merges"]) - len(pairs)
    tokens = [*list(model["vocab"])[: 256 + kept], *(left + right for left, right in pairs)]
    model["vocab"] = {token: number for number, token in enumerate(tokens)}
    model["merges"] = [*model["merges"][:kept], *pairs]
    model["ignore_merges"] = name == "llama-bpe"
    change_json(folder / "tokenizer.json", model=model, **BYTE_LEVEL[name])


def test_byte_level_tokenizers(tmp_path: Path) -> None:
    tokens: dict[str, list[list[int]]] = {}
    for name in BYTE_LEVEL:
        write_byte_level(tmp_path / name / "model", name)
        there, back = said_about(tmp_path / name / "model", tmp_path / name, MORE_TEXTS)
        assert metadata(tmp_path / name / "model.gguf")["tokenizer.ggml.pre"] == name
        assert tokenize_alike(there, back), name
        tokens[name] = there.llama["plain"]
    assert all(tokens[one] != tokens[other] for one, other in combinations(BYTE_LEVEL, 2))


@pytest.mark.parametrize("gemma", [True, False])
def test_sentencepiece_tokenizers(tmp_path: Path, gemma: bool) -> None:
    write_sentencepiece(tmp_path / "model", gemma=gemma)
    there, back = said_about(tmp_path / "model", tmp_path, MERGED_TEXTS)
    assert tokenize_alike(there, back)
    keys = metadata(tmp_path / "model.gguf")
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is not gemma
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert config(tmp_path / "back", "generation_config.json")["eos_token_id"] == [1 if gemma else 2]
    written, again = (config(folder, "tokenizer.json") for folder in (tmp_path / "model", tmp_path / "back"))
    for part in ("decoder", "normalizer"):
        assert again[part] == written[part]
    assert again["post_processor"]["single"] == written["post_processor"]["single"]


def test_runs_of_spaces_are_user_defined_tokens_as_llama_cpp_looks_for_them(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "model", gemma=True)
    convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype="f32")
    keys = metadata(tmp_path / "model.gguf")
    found = zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True)
    user_defined = [token for token, kind in found if kind == gguf.TokenType.USER_DEFINED]
    assert user_defined == [run.replace(SPACE, " ") for run in RUNS]


def test_an_added_token_beyond_the_matrix_is_left_out(tmp_path: Path) -> None:
    """As in Gemma 3's text models, whose tokenizer has the image token of the larger ones."""
    write_sentencepiece(tmp_path / "model", gemma=True)
    tokens = config(tmp_path / "model", "tokenizer.json")["added_tokens"]
    image = added_token(400, "<image_soft_token>", special=True)
    change_json(tmp_path / "model" / "tokenizer.json", added_tokens=[*tokens, image])
    report = convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype="f32")
    assert report.left_out == ("tokenizer.json: <image_soft_token> (400), for which the model has no row",)
    assert len(metadata(tmp_path / "model.gguf")["tokenizer.ggml.tokens"]) == 400


NAMED: list[JsonValue] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


def test_named_chat_templates(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    change_json(tmp_path / "model" / "tokenizer_config.json", chat_template=NAMED)
    convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype="f32")
    assert metadata(tmp_path / "model.gguf")["tokenizer.chat_template"] == "plain"
    convert(tmp_path / "model.gguf", tmp_path / "back", to="mlx", dtype="f32")
    assert config(tmp_path / "back", "tokenizer_config.json")["chat_template"] == NAMED


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    (tmp_path / "model" / "chat_template.jinja").write_text("alone")
    convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype="f32")
    assert metadata(tmp_path / "model.gguf")["tokenizer.chat_template"] == "alone"


def test_ends_that_llama_cpp_would_not_find_by_itself_are_named(tmp_path: Path) -> None:
    write_mlx(tmp_path / "model", Shape())
    change_json(tmp_path / "model" / "generation_config.json", eos_token_id=[318, 319, 65, 66])
    convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf", dtype="f32")
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.eot_token_id"] == 65
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.eom_token_id"] == 66
    convert(tmp_path / "model.gguf", tmp_path / "back", to="mlx", dtype="f32")
    assert sorted(config(tmp_path / "back", "generation_config.json")["eos_token_id"]) == [65, 66, 318, 319]


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ([["a", "a"]], "are never merged, though '.+' is a token"),
        ([["t", "h"], ["h", "e"], ["t", "h"]], "'th' is merged at place 2 and long before, with others in between"),
    ],
)
def test_merges_that_no_scores_can_stand_for(tmp_path: Path, merges: JsonValue, message: str) -> None:
    write_sentencepiece(tmp_path / "model", gemma=False)
    model = config(tmp_path / "model", "tokenizer.json")["model"]
    change_json(tmp_path / "model" / "tokenizer.json", model=model | {"merges": merges})
    with pytest.raises(ValueError, match=rf"^tokenizer.json: merges: .*({message})"):
        convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf")


def test_a_sentencepiece_tokenizer_that_splits_words_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "model", gemma=False)
    metaspace: JsonValue = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    change_json(tmp_path / "model" / "tokenizer.json", pre_tokenizer=metaspace, normalizer=None)
    with pytest.raises(ValueError, match=r"^tokenizer.json: normalizer and pre_tokenizer: are not SentencePiece's"):
        convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf")
    metaspace |= {"prepend_scheme": "always"}
    change_json(tmp_path / "model" / "tokenizer.json", pre_tokenizer=metaspace)
    convert(tmp_path / "model", tmp_path / "model.gguf", to="gguf")
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.add_space_prefix"] is True
