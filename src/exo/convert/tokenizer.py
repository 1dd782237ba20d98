"""A tokenizer, free of either format's way to write it down."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import gguf
from pydantic import JsonValue

TokenType = gguf.TokenType

_CASELESS_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> JsonValue:
    """Split by a pattern first, then bytes to characters without a pattern of their own."""
    pattern = f"{_CASELESS_ENDINGS}|{_LETTERS}|{numbers}|{_REST}"
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }


BYTE_LEVEL: JsonValue = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
"""tokenizer.json's step that turns bytes into characters and back."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
REPLACE_SPACES: JsonValue = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND_SPACE: JsonValue = {"type": "Prepend", "prepend": SPACE}
"""Steps of tokenizer.json's ``normalizer`` for SentencePiece."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merging: llama.cpp knows it by a name, tokenizer.json spells it out."""

    names: tuple[str, ...]
    """Values of ``tokenizer.ggml.pre``; the first one is written."""
    description: JsonValue
    """tokenizer.json's ``pre_tokenizer``."""
    ignore_merges: bool = False
    """Whether a piece that is a token as a whole is taken without merging."""
    adds_bos: bool = False
    """llama.cpp's default, where the file does not say."""
    normalizer: JsonValue = None
    """Of the released models; llama.cpp has none."""


PRE_TOKENIZERS = (
    PreTokenizer(("gpt-2",), BYTE_LEVEL),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3"), _split(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
    PreTokenizer(("qwen2", "deepseek-r1-qwen"), _split(r"\p{N}"), normalizer={"type": "NFC"}),
    PreTokenizer(
        ("smollm",),
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    ),
)

END_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "<|end_of_text|>",
        "<eos>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)
"""Tokens that llama.cpp takes for the end of generation by their text, whatever the file says (llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """``kind`` is llama.cpp's: "gpt2" merges characters that stand for bytes, "llama" is SentencePiece's, by scores."""

    kind: Literal["gpt2", "llama"]
    pre: PreTokenizer | None
    """None for "llama"."""
    tokens: tuple[str, ...]
    """By id. A "llama" token has ▁ for a space, but a user-defined one the space itself."""
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]
    """Of "llama": the pair that makes the token with the highest score is merged first. Empty for "gpt2"."""
    merges: tuple[tuple[str, str], ...]
    """Of "gpt2", first come first. Empty for "llama"."""
    special: Mapping[str, int]
    """Ids by role: bos, eos, pad, unk, where there is such a token."""
    ends: tuple[int, ...]
    """Ids that end generation, eos first."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    """Of "llama": whether text gets a space in front."""
    chat_templates: Mapping[str, str]
    """By name; the usual one is "default"."""


def padding(number: int) -> str:
    """The text of an id without a token, as llama.cpp's tools write it: a vocabulary may be smaller than its matrix."""
    return f"[PAD{number}]"
