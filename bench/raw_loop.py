"""What llama.cpp alone does with a batch: decode, take the largest logit of each row, decode again. Prints JSON.

``python bench/raw_loop.py MODEL.gguf SEQUENCES TOKENS``. The same context as the runner's defaults on a CPU.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp
import numpy as np
import numpy.typing as npt

CONTEXT = 4096
PROMPT_TOKENS = 11


def main() -> None:
    """Rates of the whole run, prompts included, and of decoding alone."""
    path, sequences, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = CONTEXT * sequences, sequences
    params.n_batch = params.n_ubatch = PROMPT_TOKENS * sequences
    params.n_outputs_max = sequences
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.kv_unified, params.swa_full = False, True
    assert model is not None
    context = llama_cpp.llama_init_from_model(model, params)
    assert context is not None
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    assert vocabulary is not None
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def largest() -> npt.NDArray[np.int64]:
        llama_cpp.llama_synchronize(context)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(sequences, n_vocab))
        return np.array([row.argmax() for row in logits])

    batch = llama_cpp.llama_batch_init(PROMPT_TOKENS * sequences, 0, 1)
    rows = [(1000 + s * 37 + i, i, s, i == PROMPT_TOKENS - 1) for s in range(sequences) for i in range(PROMPT_TOKENS)]
    began = time.perf_counter()
    fill(batch, rows)
    assert llama_cpp.llama_decode(context, batch) == 0
    chosen = largest()
    decoding = time.perf_counter()
    for position in range(PROMPT_TOKENS, PROMPT_TOKENS + tokens - 1):
        fill(batch, [(int(chosen[s]), position, s, True) for s in range(sequences)])
        assert llama_cpp.llama_decode(context, batch) == 0
        chosen = largest()
    ended = time.perf_counter()
    result = {
        "decode": sequences * (tokens - 1) / (ended - decoding),
        "whole": sequences * tokens / (ended - began),
    }
    print(json.dumps(result), flush=True)
    os._exit(0)


def fill(batch: llama_cpp.llama_batch, rows: list[tuple[int, int, int, bool]]) -> None:
    """Token, position, sequence and whether logits are wanted, row by row."""
    batch.n_tokens = len(rows)
    for index, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[index] = ctypes.c_int32(token)
        batch.pos[index] = position
        batch.seq_id[index][0] = sequence
        batch.n_seq_id[index] = 1
        batch.logits[index] = wanted


if __name__ == "__main__":
    main()
