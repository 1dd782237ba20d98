"""A tiny random model with control tokens for filling in the middle of a text."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.support.tiny.gguf_file import write_tensors
from tests.support.tiny.mlx_folder import write_mlx
from tests.support.tiny.shape import Shape
from tests.support.tiny.tokenizer import Token, Tokenizer
from tests.support.tiny.weights import make_weights

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")
FIRST_FIM = 256
"""The id of the first of them."""


def write_filling(path: Path, control: Sequence[str] = FIM) -> None:
    """Write a model with these control tokens. Its only merge is of a token that they replace."""
    shape = Shape()
    usual = Tokenizer.of_size(shape.vocabulary)
    tokens = list(usual.tokens)
    tokens[FIRST_FIM : FIRST_FIM + len(control)] = [Token(text, True, False) for text in control]
    write_tensors(path, shape, replace(usual, tokens=tuple(tokens), merges=usual.merges[:1]), make_weights(shape))


def write_filling_folder(folder: Path, shape: Shape) -> None:
    """Write a folder with the same control tokens, which Hugging Face's tokenizers number after all others."""
    write_mlx(folder, shape)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    ids = range(FIRST_FIM, FIRST_FIM + len(FIM))
    model["vocab"] = {text: number for text, number in model["vocab"].items() if number not in ids}
    model["merges"] = []
    added[:0] = [{**added[0], "id": number, "content": text} for number, text in zip(ids, FIM, strict=True)]
    path.write_text(json.dumps(tokenizer))
