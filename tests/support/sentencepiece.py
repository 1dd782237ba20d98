"""A small SentencePiece tokenizer as transformers writes it, like Gemma's or Llama 2's."""

import json
from pathlib import Path

from pydantic import JsonValue

from tests.support.converted import change_json
from tests.support.tiny import Shape, write_mlx

SPACE = "▁"
_WORDS = (
    "▁t th he in er ▁a ▁th ▁the ▁an nd ▁and and ing ll lo ello hello ▁hello aa aaa aaaa ba ab aab ▁s op st ▁st ▁stop "
    "or ▁w ▁wor ld world ▁world ur se ser user te em stem sy sys system ay aar nt ist as ss ssist ant"
)
PIECES = tuple(_WORDS.split())
"""In order of falling score."""
LETTERS = [SPACE, *"abcdefghijklmnopqrstuvwxyzHIWE0123456789.,!'<>/"]
RUNS = ["▁▁", "▁▁▁", "▁▁▁▁", "\n", "\n\n", "\n\n\n", "\t", "\t\t"]
"""Tokens of Gemma's vocabulary that are found before anything is merged."""

GEMMA_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_REPLACE: JsonValue = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND: JsonValue = {"type": "Prepend", "prepend": SPACE}
_NO_SPLIT: JsonValue = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_RESTORE: JsonValue = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_STRIP: JsonValue = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def write_sentencepiece(folder: Path, *, gemma: bool) -> None:
    """A twin with that tokenizer; a few ids at the end have no token."""
    write_mlx(folder, Shape("gemma3" if gemma else "llama", vocabulary=400))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(gemma)))
    bos, eos, unk = ("<bos>", "<eos>", "<unk>") if gemma else ("<s>", "</s>", "<unk>")
    options = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    ends: list[JsonValue] = [1 if gemma else 2]
    change_json(folder / "config.json", eos_token_id=ends, bos_token_id=2 if gemma else 1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def _tokenizer(gemma: bool) -> dict[str, JsonValue]:
    specials, runs = (GEMMA_SPECIALS, RUNS) if gemma else (LLAMA_SPECIALS, [])
    tokens = [*specials, *_BYTES, *runs, *PIECES, *LETTERS]
    assert len(set(tokens)) == len(tokens)
    bos = "<bos>" if gemma else "<s>"
    front: JsonValue = {"SpecialToken": {"id": bos, "type_id": 0}}
    body: JsonValue = {"Sequence": {"id": "A", "type_id": 0}}
    steps: list[JsonValue] = [_RESTORE, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "added_tokens": [
            added_token(tokens.index(text), text, special=text in specials) for text in (*specials, *runs)
        ],
        "normalizer": _REPLACE if gemma else {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]},
        "pre_tokenizer": _NO_SPLIT if gemma else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [front, body],
            "pair": [front, body, front, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": steps if gemma else [*steps, _STRIP]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": _merges([*runs, *PIECES], set(tokens)),
        },
    }


def added_token(number: int, text: str, *, special: bool) -> JsonValue:
    off: dict[str, JsonValue] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": special, **off}


def _merges(tokens: list[str], known: set[str]) -> list[JsonValue]:
    return [
        [token[:end], token[end:]]
        for token in tokens
        for end in range(1, len(token))
        if token[:end] in known and token[end:] in known
    ]
