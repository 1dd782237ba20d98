"""Asks mlx-lm about tiny models: `python -m tests.support.tiny.mlx_engine`, one JSON list of questions on stdin.

A process of its own, as importing mlx-lm lowers the process's limit of open files for good.
"""

import json
import sys
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load

from tests.support.tiny.question import Answer, Question


def answer(question: Question) -> Answer:
    model, tokenizer, *_ = load(question["folder"])
    cache = make_prompt_cache(model)
    rows = [_decode(model, mx.array([tokens]), cache) for tokens in question["batches"]]
    for _ in range(question["greedy"]):
        rows.append(_decode(model, rows[-1][-1:].argmax(axis=1, keepdims=True), cache))
    np.save(question["mlx_logits"], np.asarray(mx.concatenate(rows), np.float32))
    special = [tokenizer.encode(text, add_special_tokens=False) for text in question["texts"]]
    plain = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in question["texts"]]
    return {"special": special, "plain": plain, "warnings": []}


def _decode(model: Callable[[mx.array, list[KVCache]], mx.array], tokens: mx.array, cache: list[KVCache]) -> mx.array:
    """Feed `tokens`, [1, count], to the sequence in `cache`; logits after each, [count, vocabulary]."""
    return model(tokens, cache)[0]


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    print(json.dumps([answer(question) for question in json.load(sys.stdin)]))
