"""Describes a model from its own files: a GGUF file's metadata, or a folder's config.json."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from exo.cards.card import Count, Task
from exo.worker.protocol.validation import describe
from exo.worker.runner_common.model_files.folder_templates import chat_templates, usual
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_common.model_files.header_source import HeaderError

HEADER_LIMIT = 64 << 20
"""Bytes of metadata; a vocabulary of 262,144 tokens takes about 10 MB."""
SENTENCE_TRANSFORMER = "modules.json"
"""A file that only text embedding models have."""
_POOLING_NONE, _POOLING_RANK = 0, 4
"""llama.cpp's pooling types of models that generate and of rerankers. The others make one vector of a text."""
_REASONING_MARKS = ("</think>", "[/THINK]", "<|channel|>")
_TOGGLE = "enable_thinking"
_LONGEST_NAME = 100
_MOST_LAYERS = 1 << 10
_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel)$")
_CONDITIONAL = "ForConditionalGeneration"
_LARGEST_SIZE = 10_000_000
_LONGEST_CONTEXT = 1 << 31


class DescriptionError(Exception):
    """The file describes no model. The message continues a sentence whose subject is the file."""


@dataclass(frozen=True, slots=True)
class Description:
    """One model. Names are the author's and may be any text; they are empty if the files give none."""

    architecture: str
    name: str
    n_layers: int
    hidden_size: int
    num_key_value_heads: int | None
    context_length: int
    """Tokens; 0 if unknown."""
    task: Task
    chat_template: str | None
    quantization: str = ""
    for_transformers: bool = False
    """Whether Hugging Face's library loads the files: they name a class of it, and MLX quantised nothing."""
    other_class: str = ""
    """The class of Hugging Face's library that the files name, if it is none of a language model."""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the chat template shows, in upstream exo's terms."""
        template = self.chat_template or ""
        thinks = any(mark in template for mark in _REASONING_MARKS)
        return ("text", *(["thinking"] if thinks else []), *(["thinking_toggle"] if _TOGGLE in template else []))


def from_gguf(header: GgufHeader) -> Description:
    """Raises HeaderError for metadata that describes no language model, or not enough of it."""
    kind, architecture = header.text("general.type") or "model", header.architecture
    if kind != "model" or architecture == "clip":
        raise HeaderError(f"is no language model, but: {_printable(kind)}, architecture {architecture}")
    pooling = header.value(f"{architecture}.pooling_type", _MOST_LAYERS) or _POOLING_NONE
    encodes = "bert" in architecture or pooling != _POOLING_NONE
    return Description(
        architecture=architecture,
        name=_printable(header.text("general.name")),
        n_layers=_stated(header, "block_count"),
        hidden_size=_stated(header, "embedding_length"),
        num_key_value_heads=_size(header, "attention.head_count_kv") or None,
        context_length=_size(header, "context_length", _LONGEST_CONTEXT),
        task="TextRanking" if pooling == _POOLING_RANK else "TextEmbedding" if encodes else "TextGeneration",
        chat_template=header.text("tokenizer.chat_template") or None,
    )


def _stated(header: GgufHeader, key: str) -> int:
    if not (size := _size(header, key)):
        raise HeaderError(f"does not say {header.architecture}.{key}")
    return size


def _size(header: GgufHeader, key: str, most: int = _LARGEST_SIZE) -> int:
    """A size by its key without the architecture's name; the largest if there is one for each layer, 0 if absent."""
    name = f"{header.architecture}.{key}"
    value = header.value(name, _MOST_LAYERS) or 0
    largest = max(value, default=0) if isinstance(value, tuple) else value
    if isinstance(largest, bool) or not isinstance(largest, int) or not 0 <= largest <= most:
        raise HeaderError(f"has {name} = {ascii(value)[:100]}, expected a whole number up to {most:,}")
    return largest


class _LenientJson(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Quantization(_LenientJson):
    bits: Annotated[int, Field(ge=1, le=64)]


class _Sizes(_LenientJson):
    num_hidden_layers: Count
    hidden_size: Count
    num_key_value_heads: Count | None = None
    max_position_embeddings: Annotated[int, Field(ge=0, le=_LONGEST_CONTEXT)] | None = None


class _ConfigJson(_LenientJson):
    """``text_config`` holds the sizes of the language model if the model also has a vision part."""

    model_type: Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]
    architectures: tuple[str, ...] = Field(default=(), strict=False)
    quantization: _Quantization | None = None
    text_config: JsonValue = None
    torch_dtype: str | None = None
    dtype: str | None = None


def from_folder(read: Callable[[str], bytes | None], *, embeds: bool = False) -> Description:
    """Describes a folder. ``read`` gives a file, or None if it is absent; ``embeds`` marks a text embedding model.

    Raises DescriptionError, and what ``read`` raises.
    """
    templates: dict[str, str] = {}
    config = read("config.json") or b""
    try:
        whole = _ConfigJson.model_validate_json(config)
        nested = isinstance(whole.text_config, dict)
        sizes = _Sizes.model_validate(whole.text_config) if nested else _Sizes.model_validate_json(config)
    except ValidationError as error:
        raise DescriptionError(describe(error)[1].removeprefix(": ")) from error
    with suppress(ValueError):  # the runner that loads the folder reports it
        templates = chat_templates(read)
    bits = whole.quantization.bits if whole.quantization is not None else None
    return Description(
        architecture=_printable(whole.model_type),
        name="",
        n_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        num_key_value_heads=sizes.num_key_value_heads,
        context_length=sizes.max_position_embeddings or 0,
        task="TextEmbedding" if embeds else "TextGeneration",
        chat_template=usual(templates),
        quantization=f"{bits}bit" if bits is not None else _printable(whole.torch_dtype or whole.dtype or ""),
        for_transformers=bits is None and bool(whole.architectures),
        other_class=_other_class(whole.architectures, nested),
    )


def _other_class(classes: tuple[str, ...], nested: bool) -> str:
    """A class that generates no text, or does so from something else. A model with vision has a nested text model."""
    if not classes or any(_GENERATES.search(each) or (nested and each.endswith(_CONDITIONAL)) for each in classes):
        return ""
    return _printable(classes[0])


def _printable(text: str) -> str:
    return "".join(each for each in text if each.isprintable())[:_LONGEST_NAME]
