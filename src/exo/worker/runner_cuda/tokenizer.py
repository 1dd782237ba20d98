"""Text to token ids and token ids to bytes, by the vocabulary in the GGUF. Safe to call from any thread."""

import ctypes
from functools import cached_property

import llama_cpp

from exo.worker.protocol.commands import Prompt
from exo.worker.protocol.events import FimTokens
from exo.worker.runner_common.tokenizer import PromptEncoder
from exo.worker.runner_cuda.loading.model import Model


class GgufTokenizer:
    """Encodes prompts and looks up the bytes of tokens. Each token is looked up once."""

    def __init__(self, model: Model) -> None:
        self._vocab = model.vocab
        self.n_vocab = model.n_vocab
        self._bytes: dict[int, bytes] = {}
        self._eog: dict[int, bool] = {}
        self.bos = int(llama_cpp.llama_vocab_bos(self._vocab))  # pyright: ignore[reportArgumentType]
        self.eos = int(llama_cpp.llama_vocab_eos(self._vocab))  # pyright: ignore[reportArgumentType]
        self.adds_bos = llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self._prompts = PromptEncoder(self._encode, self.bos if self.adds_bos else None)

    def encode(self, prompt: Prompt, *, add_bos: bool = True) -> list[int]:
        """Returns the token ids of a prompt, with BOS in front if the model wants one and the text lacks it."""
        return self._prompts.encode(prompt, add_bos=add_bos)

    def _encode(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        size = len(data) + 8
        while True:
            buffer = (llama_cpp.llama_token * size)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, False, special)
            if count >= 0:
                return buffer[:count]
            size = -count

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes that a token adds to the text; none for control tokens."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._piece(token, special=False)
        return known

    def piece_of(self, token: int) -> bytes:
        """Returns the bytes that a token adds to the text, or the text of a control token."""
        return self.bytes_of(token) or self._piece(token, special=True)

    def is_control(self, token: int) -> bool:
        """Whether a token comes from special text only and adds nothing to the text."""
        return token in self._control

    def is_eog(self, token: int) -> bool:
        """Whether a token ends generation."""
        known = self._eog.get(token)
        if known is None:
            known = self._eog[token] = llama_cpp.llama_vocab_is_eog(self._vocab, token)
        return known

    @property
    def eog_tokens(self) -> tuple[int, ...]:
        """The ids of all tokens that end generation."""
        return self._ends

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(token for token in range(self.n_vocab) if self.is_eog(token))

    @cached_property
    def _control(self) -> frozenset[int]:
        return frozenset(self.special.values())

    @cached_property
    def special(self) -> dict[str, int]:
        """The ids of the control tokens by their text, which only text marked special may contain.

        User-defined tokens are not among them: llama.cpp finds those in any text.
        """
        wanted = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        special: dict[str, int] = {}
        for token in range(self.n_vocab):
            if llama_cpp.llama_vocab_get_attr(self._vocab, token) & wanted:
                special[llama_cpp.llama_vocab_get_text(self._vocab, token).decode(errors="replace")] = token
        return special

    def fim(self) -> FimTokens:
        """Returns the texts of the tokens that the file names, or that llama.cpp recognises, for filling in."""
        finders = {
            "prefix": llama_cpp.llama_vocab_fim_pre,
            "suffix": llama_cpp.llama_vocab_fim_suf,
            "middle": llama_cpp.llama_vocab_fim_mid,
            "repository": llama_cpp.llama_vocab_fim_rep,
            "file": llama_cpp.llama_vocab_fim_sep,
        }
        ids = {name: int(find(self._vocab)) for name, find in finders.items()}  # pyright: ignore[reportArgumentType]
        return FimTokens(**{name: self.text_of(token) for name, token in ids.items()})

    def text_of(self, token: int) -> str:
        """Returns a token's text, control tokens included; empty for an id that the model does not have."""
        return "" if token < 0 else self._piece(token, special=True).decode(errors="replace")

    def _piece(self, token: int, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
