"""``--score``: reads given texts through the same weights, cache and tokenizer as the generate loop."""

import sys
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from exo.worker.protocol.messages import Failed, Score, Scored
from exo.worker.protocol.wire import encode
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_mlx.loader import Loaded, load


def main(protocol: BinaryIO) -> int:
    """Answers the ``Score`` on standard input; the exit code."""
    request = Score.model_validate_json(sys.stdin.buffer.read())
    try:
        loaded = load(request.load, lambda _: None)
    except LoadError as error:
        protocol.write(encode(Failed(code=error.code, message=str(error))))
        return 1
    tokens = tuple(tuple(loaded.tokenizer.encode(prompt)) for prompt in request.prompts)
    n_ctx = loaded.capabilities.context_length
    for index, sequence in enumerate(tokens):
        if not 0 < len(sequence) <= n_ctx:
            message = f"prompt {index} has {len(sequence)} tokens; 1 to {n_ctx} can be read"
            protocol.write(encode(Failed(code="context_length_exceeded", message=message)))
            return 1
    for index, sequence in enumerate(tokens):
        np.save(Path(request.directory) / f"{index}.npy", log_probabilities(loaded, sequence))
    protocol.write(encode(Scored(tokens=tokens, capabilities=loaded.capabilities, settings=loaded.settings)))
    return 0


def log_probabilities(loaded: Loaded, tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Of every possible next token after each token, shape (len(tokens), n_vocab). Chunked as prompts are."""
    rows: list[npt.NDArray[np.float32]] = []
    for start in range(0, len(tokens), loaded.chunk):
        chunk = mx.array([tokens[start : start + loaded.chunk]])
        logits = loaded.model.forward(chunk, loaded.cache, [0], [start])
        rows.append(_log_softmax(np.array(logits[0].astype(mx.float32), np.float32)))
    return np.concatenate(rows)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)
