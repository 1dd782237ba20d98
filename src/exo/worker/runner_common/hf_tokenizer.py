"""Hugging Face's tokenizers: text to token ids and token ids to bytes.

``encode`` is for one thread. Everything else is looked up once and safe in any thread.
"""

import re
from collections.abc import Collection, Mapping
from typing import Protocol

from exo.worker.protocol.commands import Embed, Prompt, Rank, Text
from exo.worker.protocol.events import FimTokens
from exo.worker.runner_common.tokenizer import PromptEncoder

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_FIM = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),
)
_FIM_REPOSITORY = ("<|repo_name|>", "<reponame>")
_FIM_FILE = ("<|file_sep|>", "<|file_separator|>", "<file_sep>")
"""Control tokens for filling in the middle of a text, by the texts that families of models give them."""


class AddedToken(Protocol):
    """A token outside the tokenizer's model: a control token or one that a user has added."""

    content: str
    special: bool


class HfTokenizer(Protocol):
    """The attributes of Hugging Face's tokenizers that runners use."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    added_tokens_decoder: Mapping[int, AddedToken]
    backend_tokenizer: "_BackendTokenizer"

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: list[int]) -> str: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]: ...


class _BackendTokenizer(Protocol):
    decoder: "_Decoder | None"


class _Decoder(Protocol):
    def __getstate__(self) -> bytes: ...


class TransformersTokenizer:
    """Encodes prompts and knows the bytes of every token of a model folder."""

    def __init__(self, tokenizer: HfTokenizer, n_vocab: int, ends: Collection[int]) -> None:
        """``n_vocab`` is the width of the logits, which may be more than the tokenizer has tokens.

        ``ends`` are the ids that the model's files say end generation, besides the tokenizer's own.
        """
        self._tokenizer = tokenizer
        self.n_vocab = n_vocab
        self.bos = tokenizer.bos_token_id
        begins = tokenizer.encode("", add_special_tokens=True, split_special_tokens=False)
        self.adds_bos = self.bos is not None and begins[:1] == [self.bos]
        self.closing = begins[1:] if self.adds_bos else begins
        self._prompts = PromptEncoder(self._encode, self.bos if self.adds_bos else None)
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eog_tokens = tuple(sorted(token for token in {*ends, *own} if token < n_vocab))
        self.bos_text = tokenizer.bos_token or ""
        self.eos_text = tokenizer.eos_token or ""
        self.special = {
            added.content: token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        """The ids of the control tokens by their text."""
        self.fim = _fim_tokens([added.content for added in tokenizer.added_tokens_decoder.values()])
        self._control = frozenset(self.special.values())
        self._pieces = _pieces_of_all(tokenizer)

    def encode(self, prompt: Prompt, *, add_bos: bool = True) -> list[int]:
        """Returns the token ids of a prompt, with BOS in front if the model wants one and the text lacks it."""
        return self._prompts.encode(prompt, add_bos=add_bos)

    def text_tokens(self, request: Embed | Rank) -> list[int]:
        """Returns the token ids of a text to embed, with the control tokens around it that it lacks.

        Given token ids stay as they are. A ``Rank`` has none, since no runner of model folders ranks.
        """
        if isinstance(request, Rank):
            return []
        tokens, after = self.encode(request.prompt), self.closing
        given = not any(isinstance(part, Text) for part in request.prompt)
        return tokens if given or not after or tokens[-len(after) :] == after else [*tokens, *after]

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes that a token adds to the text; none for control tokens and ids that pad the vocabulary."""
        return b"" if token in self._control else self.piece_of(token)

    def piece_of(self, token: int) -> bytes:
        """Returns the bytes that a token adds to the text, or the text of a control token."""
        return self._pieces[token] if token < len(self._pieces) else b""

    def is_control(self, token: int) -> bool:
        """Whether a token comes from special text only and adds nothing to the text."""
        return token in self._control

    def is_eog(self, token: int) -> bool:
        """Whether a token ends generation."""
        return token in self.eog_tokens


def _pieces_of_all(tokenizer: HfTokenizer) -> list[bytes]:
    """Returns the bytes by token id. The tokenizer's decoder shows how a token's name spells its bytes."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    decoder = tokenizer.backend_tokenizer.decoder
    steps = "" if decoder is None else decoder.__getstate__().decode()
    if '"ByteLevel"' in steps:
        spell = _byte_level_spelling()
        found = [b"".join(spell.get(letter) or letter.encode() for letter in name or "") for name in names]
    elif '"ByteFallback"' in steps or '"Metaspace"' in steps:
        found = [_sentencepiece_bytes(name or "") for name in names]
    else:
        found = [tokenizer.decode([token]).encode() for token in range(len(names))]
    for token, added in tokenizer.added_tokens_decoder.items():
        found[token] = added.content.encode()
    return found


def _sentencepiece_bytes(name: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(byte[1])
    return name.replace("\u2581", " ").encode()


def _byte_level_spelling() -> dict[str, bytes]:
    """GPT-2's alphabet: visible Latin-1 characters stand for their own byte, code points from 256 on for the others."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes([byte]) for byte in visible} | {
        chr(256 + index): bytes([byte]) for index, byte in enumerate(others)
    }


def _fim_tokens(texts: Collection[str]) -> FimTokens:
    """Finds the control tokens for filling in the middle of a text among the texts of added tokens."""
    prefix, suffix, middle = next((each for each in _FIM if set(each) <= set(texts)), ("", "", ""))
    repository = next((each for each in _FIM_REPOSITORY if each in texts), "")
    file = next((each for each in _FIM_FILE if each in texts), "")
    return FimTokens(prefix=prefix, suffix=suffix, middle=middle, repository=repository, file=file)
