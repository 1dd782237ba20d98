"""``--score``: reads given texts through the same weights, context and tokenizer as the generate loop."""

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from exo.worker.protocol.messages import Failed, Score, Scored
from exo.worker.protocol.wire import encode
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import Context
from exo.worker.runner_cuda.loading.loader import Loaded, load, read_options


def main(protocol: BinaryIO) -> int:
    """Answers the ``Score`` on standard input; the exit code."""
    request = Score.model_validate_json(sys.stdin.buffer.read())
    try:
        loaded = load(request.load, lambda _: None, score=True)
    except LoadError as error:
        protocol.write(encode(Failed(code=error.code, message=str(error))))
        return 1
    tokens = tuple(tuple(loaded.tokenizer.encode(prompt)) for prompt in request.prompts)
    for index, sequence in enumerate(tokens):
        if not 0 < len(sequence) <= loaded.context.n_ctx:
            message = f"prompt {index} has {len(sequence)} tokens; 1 to {loaded.context.n_ctx} can be read"
            protocol.write(encode(Failed(code="context_length_exceeded", message=message)))
            return 1
    for index, sequence in enumerate(tokens):
        np.save(Path(request.directory) / f"{index}.npy", log_probabilities(loaded, sequence))
    options = read_options(request.load)
    settings = {
        "flash attention": options.flash_attn,
        "KV cache": f"{options.cache_type_k}/{options.cache_type_v}",
        "prompt chunk": str(loaded.chunk),
        "threads": str(options.threads),
    }
    protocol.write(encode(Scored(tokens=tokens, capabilities=loaded.capabilities, settings=settings)))
    return 0


def log_probabilities(loaded: Loaded, tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Of every possible next token after each token, shape (len(tokens), n_vocab). Chunked as prompts are."""
    rows: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(tokens), loaded.chunk):
        rows.append(_chunk(loaded.context, tokens[start : start + loaded.chunk], start))
    loaded.context.trim(0, 0)
    return np.concatenate(rows)


def _chunk(context: Context, tokens: tuple[int, ...], start: int) -> npt.NDArray[np.float32]:
    batch, n = context.batch, len(tokens)
    batch.tokens[:n] = tokens
    batch.positions[:n] = range(start, start + n)
    batch.slots[:n] = 0
    batch.outputs[:n] = 1
    context.decode(n)
    logits = context.logits(n).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)
