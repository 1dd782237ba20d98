"""A tiny model with a fixed reply to a prompt that ends with a line feed, and another to one that ends with a tab."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests.support.tiny.gguf_file import write_tensors
from tests.support.tiny.shape import Shape
from tests.support.tiny.tokenizer import END_OF_TURN, Token, Tokenizer, byte_characters
from tests.support.tiny.weights import make_weights

_SURE = 10.0


def write_scripted(path: Path, pieces: Sequence[str], after_tab: Sequence[str] = ()) -> None:
    """Write a llama whose greedy reply, after a line feed, is ``pieces``, a token each, and the end of its turn.

    After a tab, it is ``after_tab``.

    Attention and feed-forward add nothing, so a token's embedding alone decides which token follows.
    """
    shape = Shape()
    alphabet = byte_characters()
    usual = Tokenizer.of_size(shape.vocabulary)
    tokens = list(usual.tokens)
    ids = list(range(256, 256 + len(pieces) + len(after_tab)))
    replies = ((ord("\n"), ids[: len(pieces)]), (ord("\t"), ids[len(pieces) :]))
    for token, piece in zip(ids, (*pieces, *after_tab), strict=True):
        tokens[token] = Token("".join(alphabet[byte] for byte in piece.encode()), False, False)
    weights = make_weights(shape)
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor[:] = 0
    weights["model.norm.weight"][:] = 1
    embedding, output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:], output[:] = 0, 0
    embedding[:, 0] = 1  # the mark of a token after which the turn ends
    end = usual.id_of(END_OF_TURN)
    output[end, 0] = _SURE
    steps = [step for start, reply in replies for step in pairwise([start, *reply])]
    for channel, (token, following) in enumerate(steps, start=1):
        embedding[token] = np.eye(1, shape.hidden, channel)
        output[following, channel] = _SURE
    write_tensors(path, shape, replace(usual, tokens=tuple(tokens), merges=usual.merges), weights)
