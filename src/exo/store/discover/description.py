"""What a repository's own files say of the model in it: a GGUF file's metadata, or a folder's config.json."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from exo.cards.card import Count, Task
from exo.store.discover.gguf_header import GgufHeader, HeaderError
from exo.worker.protocol.wire import describe

_RANK = 4
_NONE = 0
"""llama.cpp's kinds of pooling: scores, and no pooling. The others make one vector of a text."""
_REASONING_MARKS = ("</think>", "[/THINK]", "<|channel|>")
_TOGGLE = "enable_thinking"
_LONGEST_NAME = 100
_LONGEST_CONTEXT = 1 << 31


class DescriptionError(Exception):
    """What is wrong with such a file; the sentence goes on from its name."""


@dataclass(frozen=True, slots=True)
class Description:
    """One model. Names are the author's own, and may be any text."""

    architecture: str
    name: str
    """Empty where the files give none."""
    n_layers: int
    hidden_size: int
    num_key_value_heads: int | None
    context_length: int
    """Tokens; 0 where unknown."""
    task: Task
    chat_template: str | None
    quantization: str = ""
    """Empty where the files do not say."""
    for_transformers: bool = False
    """Whether the files are as Hugging Face's library has them: they name a class of it, and MLX quantised nothing."""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Upstream's words for what the chat template gives away."""
        template = self.chat_template or ""
        thinks = any(mark in template for mark in _REASONING_MARKS)
        return ("text", *(["thinking"] if thinks else []), *(["thinking_toggle"] if _TOGGLE in template else []))


def from_gguf(header: GgufHeader) -> Description:
    """Raises HeaderError for metadata that is of no language model, or says too little."""
    kind = header.text("general.type") or "model"
    if kind != "model" or header.architecture == "clip":
        raise HeaderError(f"is no language model, but: {_printable(kind)}, architecture {header.architecture}")
    pooling = header.values.get(f"{header.architecture}.pooling_type", _NONE)
    encodes = "bert" in header.architecture or pooling != _NONE
    return Description(
        architecture=header.architecture,
        name=_printable(header.text("general.name")),
        n_layers=header.count("block_count"),
        hidden_size=header.count("embedding_length"),
        num_key_value_heads=header.optional_count("attention.head_count_kv") or None,
        context_length=header.optional_count("context_length", _LONGEST_CONTEXT),
        task="TextRanking" if pooling == _RANK else "TextEmbedding" if encodes else "TextGeneration",
        chat_template=header.text("tokenizer.chat_template") or None,
    )


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Quantization(_Json):
    bits: Annotated[int, Field(ge=1, le=64)]


class _Sizes(_Json):
    num_hidden_layers: Count
    hidden_size: Count
    num_key_value_heads: Count | None = None
    max_position_embeddings: Annotated[int, Field(ge=0, le=_LONGEST_CONTEXT)] | None = None


class _Config(_Json):
    """``text_config`` is where models that see keep what is said of their language."""

    model_type: Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]
    architectures: tuple[str, ...] = Field(default=(), strict=False)
    quantization: _Quantization | None = None
    text_config: JsonValue = None
    torch_dtype: str | None = None
    dtype: str | None = None


class _TokenizerConfig(_Json):
    chat_template: JsonValue = None


def from_config(
    config: bytes, tokenizer_config: bytes | None, chat_template: str | None, *, embeds: bool = False
) -> Description:
    """Of a folder's files; ``chat_template`` is that of a file of its own, ``embeds`` if it is for vectors of texts.

    Raises DescriptionError.
    """
    try:
        whole = _Config.model_validate_json(config)
        nested = isinstance(whole.text_config, dict)
        sizes = _Sizes.model_validate(whole.text_config) if nested else _Sizes.model_validate_json(config)
    except ValidationError as error:
        raise DescriptionError(describe(error)[1].removeprefix(": ")) from error
    bits = whole.quantization.bits if whole.quantization is not None else None
    return Description(
        architecture=_printable(whole.model_type),
        name="",
        n_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        num_key_value_heads=sizes.num_key_value_heads,
        context_length=sizes.max_position_embeddings or 0,
        task="TextEmbedding" if embeds else "TextGeneration",
        chat_template=chat_template or (_template(tokenizer_config) if tokenizer_config is not None else None),
        quantization=f"{bits}bit" if bits is not None else _printable(whole.torch_dtype or whole.dtype or ""),
        for_transformers=bits is None and bool(whole.architectures),
    )


def _template(tokenizer_config: bytes) -> str | None:
    """The chat template in tokenizer_config.json, the one called default where there are several."""
    try:
        found = _TokenizerConfig.model_validate_json(tokenizer_config).chat_template
    except ValidationError:
        return None
    several = found if isinstance(found, list) else []
    named = {each.get("name"): each.get("template") for each in several if isinstance(each, dict)}
    template = named.get("default") if several else found
    return template if isinstance(template, str) else None


def _printable(text: str) -> str:
    return "".join(each for each in text if each.isprintable())[:_LONGEST_NAME]
