"""Asks llama.cpp about tiny models: `python -m tests.support.tiny.llama_engine`, one JSON list of questions on stdin.

A process of its own, as llama.cpp's log handler belongs to the whole process.
"""

import json
import sys
from ctypes import c_char_p, c_int, c_void_p

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from tests.support.tiny.question import Answer, Question

Logits = NDArray[np.float32]

WARNING, ERROR = 3, 4
_warnings: list[str] = []


@llama_cpp.llama_log_callback
def _keep_warnings(level: c_int, text: c_char_p, _user_data: c_void_p) -> None:
    # ctypes hands callbacks plain values, whatever the declared types say.
    if level in (WARNING, ERROR) and isinstance(text, bytes):
        _warnings.append(text.decode())


def answer(question: Question) -> Answer:
    """A context with as little rounding as possible: float32 KV cache, no flash attention."""
    _warnings.clear()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(question["gguf"].encode(), model_params)
    if model is None:
        raise RuntimeError(f"llama.cpp could not load {question['gguf']}: {''.join(_warnings)}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = llama_cpp.llama_model_n_ctx_train(model)
    params.type_k = params.type_v = 0
    params.flash_attn_type = 0
    params.kv_unified = params.swa_full = False
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    if context is None or vocabulary is None:
        raise RuntimeError(f"llama.cpp could not make a context: {''.join(_warnings)}")
    np.save(question["llama_logits"], _logits(context, llama_cpp.llama_vocab_n_tokens(vocabulary), question))
    llama_cpp.llama_free(context)
    special = [_tokenize(vocabulary, text, parse_special=True) for text in question["texts"]]
    plain = [_tokenize(vocabulary, text, parse_special=False) for text in question["texts"]]
    llama_cpp.llama_model_free(model)
    return {"special": special, "plain": plain, "warnings": list(_warnings)}


def _tokenize(vocabulary: llama_cpp.llama_vocab_p, text: str, *, parse_special: bool) -> list[int]:
    data = text.encode()
    buffer = (llama_cpp.llama_token * len(data))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), buffer, len(data), False, parse_special)
    return list(buffer[:count])


def _logits(context: llama_cpp.llama_context_p, width: int, question: Question) -> Logits:
    rows: list[Logits] = []
    position = 0
    for tokens in question["batches"]:
        rows.append(_decode(context, width, tokens, position))
        position += len(tokens)
    for _ in range(question["greedy"]):
        rows.append(_decode(context, width, [int(rows[-1][-1].argmax())], position))
        position += 1
    return np.concatenate(rows)


def _decode(context: llama_cpp.llama_context_p, width: int, tokens: list[int], position: int) -> Logits:
    """Feed `tokens`, the first at `position`, to sequence 0 as one batch."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = position + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = 1
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens at {position}")
    llama_cpp.llama_batch_free(batch)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), width)).copy()


if __name__ == "__main__":
    llama_cpp.llama_log_set(_keep_warnings, c_void_p(0))
    print(json.dumps([answer(question) for question in json.load(sys.stdin)]))
