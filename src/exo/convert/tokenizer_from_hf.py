"""Reads a folder's tokenizer.json, tokenizer_config.json and generation_config.json.

Keys that are not read change no token. A field with one accepted value turns on something that llama.cpp lacks.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue

from exo.convert.config_json import Config
from exo.convert.hf_folder import StrictJson, read_json
from exo.convert.report import ConvertError
from exo.convert.tokenizer import (
    PRE_TOKENIZERS,
    PREPEND_SPACE,
    REPLACE_SPACES,
    SPACE,
    Merge,
    PreTokenizer,
    TokenizerData,
    TokenType,
    check_merges,
    padding,
    scores_of,
)
from exo.worker.runner_common.model_files.model_folder import HfFolder

_FILE = "tokenizer.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NO_SPLIT: JsonValue = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Gemma's pre-tokenizer, which finds nothing to split, because no space is left by then."""
_IGNORED = frozenset(("bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"))
"""Keys that config.json and tokenizer_config.json have too, or that describe the file."""

_Id = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
_Off = Literal[False]


class AddedTokenJson(StrictJson):
    """A token that is found in text before anything else."""

    id: _Id
    content: str
    special: bool = False
    single_word: _Off = False
    lstrip: _Off = False
    rstrip: _Off = False


class BpeModel(StrictJson):
    """Byte-pair encoding; ``type`` refuses the other kinds."""

    type: Literal["BPE"]
    vocab: dict[str, _Id]
    merges: list[str | tuple[str, str]]
    unk_token: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False
    dropout: Literal[0] | None = None
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None


class TokenizerJson(StrictJson):
    model: BpeModel
    added_tokens: tuple[AddedTokenJson, ...] = ()
    normalizer: JsonValue = None
    pre_tokenizer: JsonValue = None
    post_processor: JsonValue = None


class SpecialToken(StrictJson):
    content: str


class TokenizerConfig(StrictJson):
    bos_token: str | SpecialToken | None = None
    eos_token: str | SpecialToken | None = None
    pad_token: str | SpecialToken | None = None
    unk_token: str | SpecialToken | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None


class GenerationConfig(StrictJson):
    model_config = ConfigDict(extra="allow")

    eos_token_id: _Id | list[_Id] | None = None

    def left_out(self) -> list[str]:
        return [f"generation_config.json: {key}" for key in sorted((self.model_extra or {}).keys() - _IGNORED)]


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """``left_out`` names the parts that have no place in a GGUF file."""

    tokenizer: TokenizerData
    left_out: tuple[str, ...]


def read_tokenizer(folder: HfFolder, config: Config) -> FolderTokenizer:
    """Raises ConvertError naming file and key for a tokenizer that llama.cpp lacks."""
    written = read_json(folder.path / _FILE, TokenizerJson)
    options = read_json(folder.path / "tokenizer_config.json", TokenizerConfig)
    generation_file = folder.path / "generation_config.json"
    generation = read_json(generation_file, GenerationConfig) if generation_file.is_file() else GenerationConfig()
    is_sentencepiece = written.model.byte_fallback
    tokens, types, beyond = _tokens(written, config.vocab_size, is_sentencepiece)
    merges = [_pair(merge) for merge in written.model.merges]
    check_merges(f"{_FILE}: merges", merges, written.model.vocab)
    ids = {text: number for number, text in enumerate(tokens)}
    special = _special(options, written, config, ids)
    first, last = _added_ends(written.post_processor)
    tokenizer = TokenizerData(
        kind="llama" if is_sentencepiece else "gpt2",
        pre=None if is_sentencepiece else _pre_tokenizer(written),
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(scores_of(tokens, types, merges)) if is_sentencepiece else (),
        merges=() if is_sentencepiece else tuple(merges),
        special=special,
        ends=_ends(generation, config, special, len(tokens)),
        add_bos=_adds(options.add_bos_token, first, special.get("bos"), ids),
        add_eos=_adds(options.add_eos_token, last, special.get("eos"), ids),
        add_space_prefix=is_sentencepiece and _adds_space(written),
        chat_templates=folder.templates,
    )
    return FolderTokenizer(tokenizer, (*beyond, *generation.left_out()))


def _tokens(written: TokenizerJson, size: int, is_sentencepiece: bool) -> tuple[list[str], list[TokenType], list[str]]:
    """Texts and types of ``size`` ids, and the added tokens beyond them, for which the model has no row."""
    texts: dict[int, str] = {}
    types: dict[int, TokenType] = {}
    for text, number in written.model.vocab.items():
        is_byte = is_sentencepiece and _BYTE.fullmatch(text) is not None
        _put(texts, number, text)
        types[number] = TokenType.BYTE if is_byte else TokenType.NORMAL
        if is_sentencepiece and text == written.model.unk_token:
            types[number] = TokenType.UNKNOWN
    in_vocabulary = [number for number in texts if number >= size]
    if in_vocabulary:
        raise ConvertError(_FILE, f"has the token id {in_vocabulary[0]}, but config.json's vocab_size is {size}")
    beyond: list[str] = []
    for token in written.added_tokens:
        if token.id >= size:
            beyond.append(f"{_FILE}: {token.content} ({token.id}), for which the model has no row")
            continue
        texts.pop(token.id, None)
        # llama.cpp looks for such a token in text where a space is still a space.
        plain = token.content.replace(SPACE, " ") if is_sentencepiece and not token.special else token.content
        _put(texts, token.id, plain)
        types[token.id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    tokens = [texts.get(number, padding(number)) for number in range(size)]
    if len(set(tokens)) != size:
        twice = Counter(tokens).most_common(1)[0][0]
        raise ConvertError(_FILE, f"{twice!r} is two tokens, which a GGUF file cannot say")
    return tokens, [types.get(number, TokenType.UNUSED) for number in range(size)], beyond


def _put(texts: dict[int, str], number: int, text: str) -> None:
    if number in texts:
        raise ConvertError(_FILE, f"the tokens {texts[number]!r} and {text!r} have the same id {number}")
    texts[number] = text


def _pair(merge: str | tuple[str, str]) -> Merge:
    if isinstance(merge, tuple):
        return merge
    left, space, right = merge.partition(" ")
    if not space:
        raise ConvertError(f"{_FILE}: merges", f"holds {merge!r}, expected two tokens")
    return left, right


def _pre_tokenizer(written: TokenizerJson) -> PreTokenizer:
    if written.normalizer not in (None, {"type": "NFC"}):
        raise ConvertError(f"{_FILE}: normalizer", f"is {written.normalizer}; accepted: none and NFC")
    for pre in PRE_TOKENIZERS:
        if _essence(pre.description) == _essence(written.pre_tokenizer):
            if pre.ignore_merges != written.model.ignore_merges:
                expected = str(pre.ignore_merges).lower()
                raise ConvertError(f"{_FILE}: ignore_merges", f"expected {expected} for {pre.names[0]}")
            return pre
    accepted = ", ".join(pre.names[0] for pre in PRE_TOKENIZERS)
    raise ConvertError(f"{_FILE}: pre_tokenizer", f"is none that llama.cpp has; accepted: those of {accepted}")


def _essence(description: JsonValue) -> JsonValue:
    """A pre-tokenizer's description without the keys that change no token."""
    if isinstance(description, list):
        return [_essence(part) for part in description]
    if not isinstance(description, dict):
        return description
    defaults: dict[str, JsonValue] = {"use_regex": True} if description.get("type") == "ByteLevel" else {}
    kept = {key: _essence(value) for key, value in description.items() if key != "trim_offsets"}
    return defaults | kept


def _adds_space(written: TokenizerJson) -> bool:
    """Whether SentencePiece text gets a space in front, from the normalizer or, in newer files, from Metaspace."""
    normalizer, pre_tokenizer = written.normalizer, written.pre_tokenizer
    if pre_tokenizer in (None, _NO_SPLIT):
        if normalizer == REPLACE_SPACES:
            return False
        if normalizer == {"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]}:
            return True
    if normalizer is None and isinstance(pre_tokenizer, dict):
        scheme = pre_tokenizer.get("prepend_scheme")
        plain = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        if pre_tokenizer == plain and scheme in ("always", "never"):
            return scheme == "always"
    raise ConvertError(f"{_FILE}: normalizer and pre_tokenizer", "are not SentencePiece's, which llama.cpp has")


def _special(
    options: TokenizerConfig, written: TokenizerJson, config: Config, ids: Mapping[str, int]
) -> dict[str, int]:
    first_end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    by_text = {
        "bos": options.bos_token,
        "eos": options.eos_token,
        "pad": options.pad_token,
        "unk": options.unk_token or written.model.unk_token,
    }
    found = {"bos": config.bos_token_id, "eos": first_end, "pad": config.pad_token_id}
    found |= {role: _id_of(role, token, ids) for role, token in by_text.items() if token is not None}
    for role, number in found.items():
        if number is not None and not 0 <= number < len(ids):
            raise ConvertError(f"config.json: {role}_token_id", f"is {number}, but there are {len(ids)} tokens")
    return {role: number for role, number in found.items() if number is not None}


def _id_of(role: str, token: str | SpecialToken, ids: Mapping[str, int]) -> int:
    text = token if isinstance(token, str) else token.content
    if text not in ids:
        raise ConvertError(f"tokenizer_config.json: {role}_token", f"{text!r} is no token")
    return ids[text]


def _ends(generation: GenerationConfig, config: Config, special: Mapping[str, int], count: int) -> tuple[int, ...]:
    stated = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    numbers = stated if isinstance(stated, list) else [] if stated is None else [stated]
    for number in numbers:
        if not 0 <= number < count:
            raise ConvertError("eos_token_id", f"is {number}, but there are {count} tokens")
    return tuple(dict.fromkeys((*((special["eos"],) if "eos" in special else ()), *numbers)))


def _added_ends(post_processor: JsonValue) -> tuple[str | None, str | None]:
    """The special tokens that a template puts in front of and behind a text."""
    if not isinstance(post_processor, dict):
        return None, None
    steps = post_processor.get("processors")
    if isinstance(steps, list):
        found = [_added_ends(step) for step in steps]
        return next((ends for ends in found if ends != (None, None)), (None, None))
    single = post_processor.get("single")
    if not isinstance(single, list) or not single:
        return None, None
    return _special_text(single[0]), _special_text(single[-1])


def _special_text(piece: JsonValue) -> str | None:
    special = piece.get("SpecialToken") if isinstance(piece, dict) else None
    text = special.get("id") if isinstance(special, dict) else None
    return text if isinstance(text, str) else None


def _adds(stated: bool | None, in_template: str | None, number: int | None, ids: Mapping[str, int]) -> bool:
    """tokenizer_config.json decides, as in transformers; without it the template, if it adds that token."""
    if stated is not None:
        return stated
    return in_template is not None and number is not None and ids.get(in_template) == number
