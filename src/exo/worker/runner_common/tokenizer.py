"""The tokenizer operations that every runner has, and the part of encoding that is the same in all of them."""

from collections.abc import Callable
from typing import Protocol

from exo.worker.protocol.commands import Prompt, Text
from exo.worker.runner_common.detokenizer import Vocabulary


class Tokenizer(Vocabulary, Protocol):
    """A loaded model's tokenizer."""

    n_vocab: int
    """The width of the logits."""

    @property
    def eog_tokens(self) -> tuple[int, ...]:
        """The ids of all tokens that end generation."""
        ...

    def encode(self, prompt: Prompt, *, add_bos: bool = True) -> list[int]:
        """Returns the token ids of a prompt, with BOS in front if the model wants one and the text lacks it."""
        ...

    def is_control(self, token: int) -> bool:
        """Whether a token comes from special text only and adds nothing to the text."""
        ...


class PromptEncoder:
    """Turns prompts into token ids. Remembers the latest prompt, which several sequences may share."""

    def __init__(self, encode_text: Callable[[str, bool], list[int]], bos: int | None) -> None:
        """``encode_text`` takes a text and whether control tokens in it are special.

        ``bos`` is the id that begins every prompt; None if the model wants none.
        """
        self._encode_text = encode_text
        self._bos = bos
        self._latest: tuple[object, bool, list[int]] = (), False, []
        """A prompt, whether it got a BOS token, and its token ids."""

    def encode(self, prompt: Prompt, *, add_bos: bool) -> list[int]:
        """Returns given token ids unchanged, and those of a text with BOS in front unless it is there already."""
        texts = [part for part in prompt if isinstance(part, Text)]
        if not texts:
            return [part for part in prompt if isinstance(part, int)]
        if prompt is self._latest[0] and add_bos == self._latest[1]:
            return self._latest[2].copy()
        tokens = [token for part in texts if part.text for token in self._encode_text(part.text, part.special)]
        if add_bos and self._bos is not None and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        self._latest = prompt, add_bos, tokens.copy()
        return tokens
