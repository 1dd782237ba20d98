"""The model of the fake runner, which computes nothing.

A token is a byte, or one of two special tokens. The next token is a hash of all tokens before it, so that a request
that continues elsewhere, with its output appended to its prompt, gets the same tokens. Above temperature 0 the token
also depends on (seed, position). Among the tokens that a grammar allows, it takes the one that ends the output soonest.
"""

import math
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING

from exo.worker.protocol.commands import Generate, Picture, Text
from exo.worker.protocol.events import Logprob, PromptLogprobs, TokenLogprobs
from exo.worker.protocol.messages import PART_LOGPROBS
from exo.worker.runner_common.detokenizer import TextStream

if TYPE_CHECKING:  # importing it takes as long as all the rest of the fake runner
    from exo.worker.runner_common.constraint import Constraint

BOS, EOS = 256, 257
SPECIAL_TOKENS = {"<bos>": BOS, "<eos>": EOS}
ALPHABET = "etaoin shrdlu"
ENDS_SOON = b'}]"'


@dataclass(slots=True)
class FakeSequence:
    """One request. ``state`` is the hash of prompt and output so far; ``output`` includes tokens delivered before."""

    request: Generate
    prompt: list[int]
    text: TextStream
    state: int
    output: int
    constraint: "Constraint | None" = None
    processed: int = 0

    @property
    def prefill(self) -> int:
        return len(self.prompt) + len(self.request.delivered)

    def next_token(self, eos_after: int | None, answer: bytes = b"") -> int:
        if answer:
            return answer[self.output] if self.output < len(answer) else EOS
        if self.output == eos_after and not self.request.ignore_eos:
            return EOS
        sampling, choice = self.request.sampling, self.state
        if sampling.temperature > 0:
            choice += zlib.crc32(struct.pack("<QI", sampling.seed, len(self.prompt) + self.output))
        if self.constraint is None or self.constraint.mask().all():
            return ord(ALPHABET[choice % len(ALPHABET)])
        return self.allowed_token(self.constraint, choice)

    def allowed_token(self, constraint: "Constraint", choice: int) -> int:
        allowed = constraint.mask()
        if allowed[EOS] and not self.request.ignore_eos:
            return EOS
        soon = [token for token in ENDS_SOON if allowed[token]]
        rest = [token for token in range(EOS) if allowed[token]]
        return soon[0] if soon else rest[choice % len(rest)]


class Vocabulary:
    def bytes_of(self, token: int) -> bytes:
        return b"" if token in SPECIAL_TOKENS.values() else bytes([token])

    def piece_of(self, token: int) -> bytes:
        special = {number: text for text, number in SPECIAL_TOKENS.items()}
        return special[token].encode() if token in special else bytes([token])

    def is_eog(self, token: int) -> bool:
        return token == EOS


def logprobs_of(state: int, token: int, n_top: int) -> TokenLogprobs:
    """A letter that greedy decoding would choose has 1/2, the next one in the alphabet 1/4 and so on."""
    first = state % len(ALPHABET)
    ranked = [ord(letter) for letter in ALPHABET[first:] + ALPHABET[:first]]
    known = {letter: -min(rank + 1, len(ranked) - 1) * math.log(2) for rank, letter in enumerate(ranked)}
    piece_of = Vocabulary().piece_of
    chosen, *top = (
        Logprob(token=each, bytes=tuple(piece_of(each)), logprob=known.get(each, -9999.0))
        for each in (token, *ranked[:n_top])
    )
    return TokenLogprobs(chosen=chosen, top=tuple(top))


def prompt_logprobs_of(request: Generate, prompt: Sequence[int]) -> list[PromptLogprobs]:
    first = Logprob(token=prompt[0], bytes=tuple(Vocabulary().piece_of(prompt[0])), logprob=None)
    items, state = [TokenLogprobs(chosen=first)], 0
    for before, token in pairwise(prompt):
        state = hash_tokens([before], state)
        items.append(logprobs_of(state, token, request.prompt_logprobs or 0))
    size = PART_LOGPROBS // (1 + (request.prompt_logprobs or 0))
    starts = range(0, len(items), size)
    return [PromptLogprobs(id=request.id, start=at, items=tuple(items[at : at + size])) for at in starts]


def tokenize(prompt: Sequence[Text | Picture | int]) -> list[int]:
    """A picture is four tokens that depend on its content."""
    tokens: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            tokens.append(part)
        elif isinstance(part, Picture):
            tokens += sha256(part.png.encode()).digest()[:4]
        elif part.special and part.text in SPECIAL_TOKENS:
            tokens.append(SPECIAL_TOKENS[part.text])
        else:
            tokens += part.text.encode()
    return tokens


def hash_tokens(tokens: Sequence[int], state: int = 0) -> int:
    return zlib.crc32(struct.pack(f"<{len(tokens)}H", *tokens), state)


def vector_of(tokens: Sequence[int]) -> tuple[float, ...]:
    """Eight numbers that depend on the text."""
    dice = random.Random(hash_tokens(tokens))
    drawn = [dice.gauss() for _ in range(8)]
    length = math.hypot(*drawn)
    return tuple(each / length for each in drawn)


def score_of(query: str, document: str) -> float:
    """The number of words of the query that occur in the document."""
    return float(len(set(query.split()) & set(document.split())))


def expected_text(prompt: str, tokens: int) -> str:
    """The greedy answer to ``prompt``."""
    state, text = hash_tokens(tokenize([Text(text=prompt)])), ""
    for _ in range(tokens):
        text += ALPHABET[state % len(ALPHABET)]
        state = hash_tokens([ord(text[-1])], state)
    return text
