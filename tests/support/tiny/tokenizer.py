"""A byte-level BPE tokenizer of any size, the same for both engines, and its chat template."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from string import ascii_lowercase
from typing import Self

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Each word is built letter by letter from the left, so its beginnings are tokens as well.
WORDS = (" the", " and", " you", "ing", "er", "user", "system", "assistant", "hello", "world", " stop", " a", " o")


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    """The text in the byte-level alphabet, in which every byte is one printable character; special tokens stay."""
    special: bool
    printable: bool
    """Whether it stands for printable ASCII only, including the space."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    tokens: tuple[Token, ...]
    merges: tuple[tuple[str, str], ...]

    @classmethod
    @cache
    def of_size(cls, size: int) -> Self:
        """The tokenizer with exactly `size` tokens.

        Raises ValueError if `size` leaves no room for one merge, or asks for more merges than there are.
        """
        smallest = 256 + 1 + len(SPECIAL_TOKENS)
        if size < smallest:
            raise ValueError(f"vocabulary is {size}, expected at least {smallest}: bytes, a merge, special tokens")
        characters = byte_characters()
        tokens = [Token(character, False, 0x20 <= byte < 0x7F) for byte, character in enumerate(characters)]
        merges = _first_merges(size - 256 - len(SPECIAL_TOKENS))
        tokens += [Token(left + right, False, True) for left, right in merges]
        tokens += [Token(text, True, False) for text in SPECIAL_TOKENS]
        if len(tokens) < size:
            raise ValueError(f"vocabulary is {size}, expected at most {len(tokens)}")
        return cls(tuple(tokens), tuple(merges))

    def id_of(self, text: str) -> int:
        """The id of a token by its text in the byte-level alphabet. Raises ValueError if there is none."""
        return next(number for number, token in enumerate(self.tokens) if token.text == text)


def byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's byte-level alphabet.

    Visible Latin-1 characters stand for themselves; the other bytes, in order, take the code points from 256 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


def _first_merges(count: int) -> list[tuple[str, str]]:
    """The first `count` merges, or as many as there are, no two of which give the same token."""
    merges: dict[str, tuple[str, str]] = {}
    for left, right in _all_merges():
        if len(merges) == count:
            break
        merges.setdefault(left + right, (left, right))
    return list(merges.values())


def _all_merges() -> Iterator[tuple[str, str]]:
    space = byte_characters()[0x20]
    for word in WORDS:
        text = word.replace(" ", space)
        for end in range(1, len(text)):
            yield text[:end], text[end]
    pairs = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)]
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from product(pairs, pairs)
