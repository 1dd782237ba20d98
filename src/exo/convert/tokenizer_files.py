"""What is read of tokenizer.json, tokenizer_config.json and generation_config.json; other keys change no token.

A field with one accepted value turns on something that llama.cpp does not have.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

_SAYS_NOTHING = frozenset(("bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"))
"""Keys that config.json and tokenizer_config.json have too, or that are about the file."""

_Id = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
_Off = Literal[False]


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class AddedToken(_Json):
    """A token that is found in text before anything else."""

    id: _Id
    content: str
    special: bool = False
    single_word: _Off = False
    lstrip: _Off = False
    rstrip: _Off = False


class Model(_Json):
    """Byte-pair encoding; the other kinds are refused by ``type``."""

    type: Literal["BPE"]
    vocab: dict[str, _Id]
    merges: list[str | tuple[str, str]]
    unk_token: str | None = None
    byte_fallback: bool = False
    ignore_merges: bool = False
    dropout: Literal[0] | None = None
    continuing_subword_prefix: Literal[""] | None = None
    end_of_word_suffix: Literal[""] | None = None


class TokenizerJson(_Json):
    model: Model
    added_tokens: list[AddedToken] = []
    normalizer: JsonValue = None
    pre_tokenizer: JsonValue = None
    post_processor: JsonValue = None


class SpecialToken(_Json):
    content: str


class Template(_Json):
    name: str
    template: str


class TokenizerConfig(_Json):
    bos_token: str | SpecialToken | None = None
    eos_token: str | SpecialToken | None = None
    pad_token: str | SpecialToken | None = None
    unk_token: str | SpecialToken | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    chat_template: str | list[Template] | None = None


class GenerationConfig(_Json):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    eos_token_id: _Id | list[_Id] | None = None

    def left_out(self) -> list[str]:
        return [f"generation_config.json: {key}" for key in sorted((self.model_extra or {}).keys() - _SAYS_NOTHING)]
