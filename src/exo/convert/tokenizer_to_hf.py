"""Writes a folder's tokenizer.json and tokenizer_config.json, which transformers and mlx-lm load."""

from pydantic import JsonValue

from exo.convert.tokenizer import (
    BYTE_LEVEL,
    PREPEND_SPACE,
    REPLACE_SPACES,
    SPACE,
    TokenizerData,
    TokenType,
    merges_of,
    padding,
)

_RESTORE_SPACES: JsonValue = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_STRIP: JsonValue = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

_FOUND_FIRST = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
"""The types of tokens that a tokenizer looks for in text before anything else."""


def tokenizer_json(tokenizer: TokenizerData) -> dict[str, JsonValue]:
    is_sentencepiece = tokenizer.kind == "llama"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "normalizer": _normalizer(tokenizer),
        "pre_tokenizer": None if tokenizer.pre is None else tokenizer.pre.description,
        "post_processor": _post_processor(tokenizer),
        "decoder": _decoder(tokenizer) if is_sentencepiece else BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _text(tokenizer, "unk") if is_sentencepiece else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": is_sentencepiece,
            "byte_fallback": is_sentencepiece,
            "ignore_merges": tokenizer.pre is not None and tokenizer.pre.ignore_merges,
            "vocab": {
                text: number for number, text in enumerate(tokenizer.tokens) if not _is_padding(tokenizer, number)
            },
            "merges": _merges(tokenizer),
        },
    }


def _is_padding(tokenizer: TokenizerData, number: int) -> bool:
    return tokenizer.types[number] == TokenType.UNUSED and tokenizer.tokens[number] == padding(number)


def _merges(tokenizer: TokenizerData) -> JsonValue:
    if tokenizer.kind == "gpt2":
        return [[left, right] for left, right in tokenizer.merges]
    return [[left, right] for left, right in merges_of(tokenizer.tokens, tokenizer.types, tokenizer.scores)]


def _added_tokens(tokenizer: TokenizerData) -> list[JsonValue]:
    return [
        {
            "id": number,
            "content": tokenizer.tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != TokenType.USER_DEFINED,
        }
        for number, kind in enumerate(tokenizer.types)
        if kind in _FOUND_FIRST
    ]


def _normalizer(tokenizer: TokenizerData) -> JsonValue:
    if tokenizer.pre is not None:
        return tokenizer.pre.normalizer
    return (
        {"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]}
        if tokenizer.add_space_prefix
        else REPLACE_SPACES
    )


def _decoder(tokenizer: TokenizerData) -> JsonValue:
    """mlx-lm recognises both forms and then decodes as it streams."""
    steps: list[JsonValue] = [_RESTORE_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {"type": "Sequence", "decoders": [*steps, _STRIP] if tokenizer.add_space_prefix else steps}


def _post_processor(tokenizer: TokenizerData) -> JsonValue:
    """Puts BOS in front of and EOS behind every text if the model wants them."""
    front = [role for role in ("bos",) if tokenizer.add_bos and role in tokenizer.special]
    back = [role for role in ("eos",) if tokenizer.add_eos and role in tokenizer.special]
    if not front and not back:
        return None

    def around(sequence: str, type_id: int) -> list[JsonValue]:
        def special(role: str) -> JsonValue:
            return {"SpecialToken": {"id": _text(tokenizer, role), "type_id": type_id}}

        middle: JsonValue = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [*map(special, front), middle, *map(special, back)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            tokenizer.tokens[tokenizer.special[role]]: {
                "id": _text(tokenizer, role),
                "ids": [tokenizer.special[role]],
                "tokens": [_text(tokenizer, role)],
            }
            for role in (*front, *back)
        },
    }


def _text(tokenizer: TokenizerData, role: str) -> str | None:
    return tokenizer.tokens[tokenizer.special[role]] if role in tokenizer.special else None


def tokenizer_config_json(tokenizer: TokenizerData, context_length: int) -> dict[str, JsonValue]:
    config: dict[str, JsonValue] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": _text(tokenizer, role) for role in ("bos", "eos", "pad", "unk")},
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    templates = tokenizer.chat_templates
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return config


def token_ids(tokenizer: TokenizerData) -> dict[str, JsonValue]:
    """The ids in both config.json and generation_config.json. More than one token may end generation."""
    ids: dict[str, JsonValue] = {
        f"{role}_token_id": tokenizer.special[role] for role in ("bos", "pad") if role in tokenizer.special
    }
    if tokenizer.ends:
        ids["eos_token_id"] = list(tokenizer.ends)
    return ids
