"""A tokenizer, free of either format's notation, and SentencePiece's scores as a list of merges and back.

SentencePiece merges the two neighbours whose concatenation is the token with the highest score; byte-pair encoding
merges the pair that comes first in a list. The equivalent list has every split of a token into two, by falling score.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import gguf
from pydantic import JsonValue

from exo.convert.report import ConvertError

Merge = tuple[str, str]

TokenType = gguf.TokenType

_CASELESS_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> JsonValue:
    """Splits by a pattern, then turns bytes into characters without a pattern of that step's own."""
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
"""SentencePiece's character for a space."""
REPLACE_SPACES: JsonValue = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND_SPACE: JsonValue = {"type": "Prepend", "prepend": SPACE}
"""The steps of tokenizer.json's ``normalizer`` for SentencePiece."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is split before merging. llama.cpp knows it by a name, tokenizer.json spells it out."""

    names: tuple[str, ...]
    """The values of ``tokenizer.ggml.pre``; the first one is written."""
    description: JsonValue
    """tokenizer.json's ``pre_tokenizer``."""
    ignore_merges: bool = False
    """Whether a piece that is a token as a whole is taken without merging."""
    adds_bos: bool = False
    """llama.cpp's default."""
    normalizer: JsonValue = None
    """The one of the released models; llama.cpp has none."""


PRE_TOKENIZERS = (
    PreTokenizer(("gpt-2",), BYTE_LEVEL),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3"), _split(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
    PreTokenizer(("qwen2", "deepseek-r1-qwen"), _split(r"\p{N}"), normalizer={"type": "NFC"}),
    PreTokenizer(
        ("smollm",), {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
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
"""Tokens that end generation in llama.cpp because of their text, whatever the file says (llama-vocab.cpp)."""


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """``kind`` is llama.cpp's: "gpt2" merges characters that stand for bytes, "llama" is SentencePiece's, by scores."""

    kind: Literal["gpt2", "llama"]
    pre: PreTokenizer | None
    """None for "llama"."""
    tokens: tuple[str, ...]
    """By id. A "llama" token has ▁ for a space, but a user-defined one the space itself."""
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]
    """Empty for "gpt2"."""
    merges: tuple[Merge, ...]
    """The first pair in the list is merged first. Empty for "llama"."""
    special: Mapping[str, int]
    """Ids by role: bos, eos, pad and unk, as far as there are such tokens."""
    ends: tuple[int, ...]
    """Ids that end generation, eos first."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    """Whether text gets a space in front; False for "gpt2"."""
    chat_templates: Mapping[str, str]
    """By name; the usual one is "default"."""


def padding(number: int) -> str:
    """The text that llama.cpp's tools give an id without a token: a vocabulary may be smaller than its matrix."""
    return f"[PAD{number}]"


def check_merges(where: str, merges: Iterable[Merge], tokens: Container[str]) -> None:
    """Raises ConvertError for a merge whose parts or whose result are no tokens."""
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in tokens:
                raise ConvertError(where, f"{left!r} and {right!r} need {token!r}, which is no token")


def merges_of(tokens: Sequence[str], types: Sequence[TokenType], scores: Sequence[float]) -> list[Merge]:
    """Every split of each normal token into two tokens, by falling score."""
    known = set(tokens)
    normal = [number for number, kind in enumerate(types) if kind == TokenType.NORMAL]
    normal.sort(key=lambda number: -scores[number])
    return [merge for number in normal for merge in _splits(tokens[number], known)]


def _splits(token: str, known: set[str]) -> Iterator[Merge]:
    for end in range(1, len(token)):
        left, right = token[:end], token[end:]
        if left in known and right in known:
            yield left, right


def scores_of(tokens: Sequence[str], types: Sequence[TokenType], merges: Iterable[Merge]) -> list[float]:
    """The inverse of ``merges_of``: a token's score is the place of its first merge, counted down.

    Raises ConvertError for a list that no scores can express.
    """
    places: dict[str, int] = {}
    given: set[Merge] = set()
    latest = ""
    for place, (left, right) in enumerate(merges):
        token = left + right
        if token != latest and token in places:
            raise _no_scores(f"{token!r} is merged at place {place} and long before, with others in between")
        latest = token
        places.setdefault(token, place)
        given.add((left, right))
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    for token in normal:
        for left, right in _splits(token, normal):
            if (left, right) not in given:
                raise _no_scores(f"{left!r} and {right!r} are never merged, though {token!r} is a token")
    return [_score(kind, places.get(token, len(given))) for token, kind in zip(tokens, types, strict=True)]


def _score(kind: TokenType, place: int) -> float:
    """Bytes get 0 and special tokens -1000, as in llama.cpp's tools; they are never compared with other scores."""
    if kind == TokenType.BYTE:
        return 0.0
    return -float(place) if kind == TokenType.NORMAL else -1000.0


def _no_scores(reason: str) -> ConvertError:
    return ConvertError("tokenizer.json: merges", f"{reason}; expected the merges of a SentencePiece vocabulary")
