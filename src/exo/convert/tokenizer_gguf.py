"""A tokenizer in a GGUF file's metadata, read and written."""

from collections import Counter
from collections.abc import Sequence

from exo.convert.gguf_file import Metadata, MetadataReader
from exo.convert.report import ConvertError
from exo.convert.tokenizer import END_TEXTS, PRE_TOKENIZERS, Merge, PreTokenizer, TokenizerData, TokenType, check_merges

_ROLES = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}
_MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_TEMPLATE = "tokenizer.chat_template"
_TEMPLATE_NAMES = "tokenizer.chat_templates"
_SENTENCEPIECE_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}
"""llama.cpp's defaults."""


def read_tokenizer(fields: MetadataReader) -> TokenizerData:
    """Raises ConvertError for a tokenizer that tokenizer.json cannot express."""
    kind = fields.text("tokenizer.ggml.model")
    tokens = fields.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise ConvertError("tokenizer.ggml.tokens", f"{twice!r} is two tokens")
    types = _types(fields, len(tokens))
    if kind == "gpt2":
        pre = _pre_tokenizer(fields)
        merges = tuple(_merge(text) for text in fields.texts("tokenizer.ggml.merges"))
        check_merges("tokenizer.ggml.merges", merges, frozenset(tokens))
        scores: tuple[float, ...] = ()
        # llama.cpp ignores both for byte-level tokenizers.
        fields.ignore("tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix")
    elif kind == "llama":
        pre, merges = None, ()
        scores = tuple(fields.numbers("tokenizer.ggml.scores", len(tokens)))
        fields.expect("tokenizer.ggml.remove_extra_whitespaces", False)
        fields.ignore("tokenizer.ggml.pre")
    else:
        raise ConvertError("tokenizer.ggml.model", f"is {kind!r}; accepted: gpt2 and llama")
    special = _special(fields, kind, len(tokens))
    fields.expect("tokenizer.ggml.add_sep_token", False)
    return TokenizerData(
        kind=kind,
        pre=pre,
        tokens=tuple(tokens),
        types=types,
        scores=scores,
        merges=merges,
        special=special,
        ends=_ends(fields, special, tokens, types),
        add_bos=fields.flag("tokenizer.ggml.add_bos_token", kind == "llama" or (pre is not None and pre.adds_bos)),
        add_eos=fields.flag("tokenizer.ggml.add_eos_token", False),
        add_space_prefix=kind == "llama" and fields.flag("tokenizer.ggml.add_space_prefix", True),
        chat_templates=_chat_templates(fields),
    )


def _types(fields: MetadataReader, count: int) -> tuple[TokenType, ...]:
    if "tokenizer.ggml.token_type" not in fields:
        return (TokenType.NORMAL,) * count
    known = {int(kind): kind for kind in TokenType}
    numbers = fields.numbers("tokenizer.ggml.token_type", count)
    unknown = [number for number in numbers if number not in known]
    if unknown:
        raise ConvertError("tokenizer.ggml.token_type", f"holds {unknown[0]:g}; accepted: 1 to {max(known)}")
    return tuple(known[int(number)] for number in numbers)


def _pre_tokenizer(fields: MetadataReader) -> PreTokenizer:
    name = fields.text("tokenizer.ggml.pre")
    for pre in PRE_TOKENIZERS:
        if name in pre.names:
            return pre
    accepted = ", ".join(name for pre in PRE_TOKENIZERS for name in pre.names)
    raise ConvertError("tokenizer.ggml.pre", f"is {name!r}; accepted: {accepted}")


def _merge(text: str) -> Merge:
    left, space, right = text.partition(" ")
    if not space or " " in right:
        raise ConvertError("tokenizer.ggml.merges", f"holds {text!r}, expected two tokens with a space between")
    return left, right


def _special(fields: MetadataReader, kind: str, count: int) -> dict[str, int]:
    found = dict(_SENTENCEPIECE_DEFAULTS) if kind == "llama" else {}
    for role, key in _ROLES.items():
        if (number := fields.optional_integer(key)) is not None:
            found[role] = _checked(key, number, count)
    return found


def _ends(
    fields: MetadataReader, special: dict[str, int], tokens: Sequence[str], types: Sequence[TokenType]
) -> tuple[int, ...]:
    """The ids that the file names, then those that llama.cpp recognises by their text."""
    named = [special["eos"]] if "eos" in special else []
    for key in _MORE_ENDS:
        if (number := fields.optional_integer(key)) is not None:
            named.append(_checked(key, number, len(tokens)))
    by_text = [
        number
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == TokenType.CONTROL and text in END_TEXTS
    ]
    return tuple(dict.fromkeys((*named, *by_text)))


def _checked(key: str, number: int, count: int) -> int:
    if number >= count:
        raise ConvertError(key, f"is {number}, but there are {count} tokens")
    return number


def _chat_templates(fields: MetadataReader) -> dict[str, str]:
    templates = {"default": fields.text(_TEMPLATE)} if _TEMPLATE in fields else {}
    for name in fields.texts(_TEMPLATE_NAMES) if _TEMPLATE_NAMES in fields else ():
        templates[name] = fields.text(f"{_TEMPLATE}.{name}")
    return templates


def write_tokenizer(tokenizer: TokenizerData) -> Metadata:
    """Metadata keys. Raises ConvertError for a tokenizer that llama.cpp has no keys for."""
    metadata: dict[str, bool | int | str | Sequence[str] | Sequence[int] | Sequence[float]] = {
        "tokenizer.ggml.model": tokenizer.kind,
        "tokenizer.ggml.pre": "default" if tokenizer.pre is None else tokenizer.pre.names[0],
        "tokenizer.ggml.tokens": tokenizer.tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in tokenizer.types],
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": tokenizer.add_eos,
    }
    if tokenizer.kind == "llama":
        metadata["tokenizer.ggml.scores"] = tokenizer.scores
        metadata["tokenizer.ggml.add_space_prefix"] = tokenizer.add_space_prefix
    else:
        metadata["tokenizer.ggml.merges"] = [_joined(merge) for merge in tokenizer.merges]
    metadata |= {key: tokenizer.special[role] for role, key in _ROLES.items() if role in tokenizer.special}
    metadata |= _more_ends(tokenizer)
    others = [name for name in tokenizer.chat_templates if name != "default"]
    for name, template in tokenizer.chat_templates.items():
        metadata[_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}"] = template
    if others:
        metadata[_TEMPLATE_NAMES] = others
    return metadata


def _joined(merge: Merge) -> str:
    if " " in merge[0] or " " in merge[1]:
        raise ConvertError("tokenizer.json: merges", f"{merge} has a space, which a GGUF file's merges cannot")
    return " ".join(merge)


def _more_ends(tokenizer: TokenizerData) -> dict[str, int]:
    """Keys for the ids that end generation and that llama.cpp would not find without them."""
    eos = tokenizer.special.get("eos")
    rest = [number for number in tokenizer.ends if number != eos and tokenizer.tokens[number] not in END_TEXTS]
    if len(rest) > len(_MORE_ENDS):
        raise ConvertError("eos_token_id", f"has {rest} besides {eos}, but a GGUF file can name {len(_MORE_ENDS)}")
    return dict(zip(_MORE_ENDS, rest, strict=False))
