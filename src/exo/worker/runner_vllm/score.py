"""``--score``: reads given texts through the same weights, cache and tokenizer as the generate loop."""

import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from exo.worker.protocol.messages import Failed, SamplingParams, Score, Scored
from exo.worker.protocol.wire import encode
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_vllm.loader import Loaded, load
from exo.worker.runner_vllm.sequence import Choice, Sequence

_BEHIND = 2
"""Cells that reading a text takes behind it: a token whose own probability is told last, and one that is generated."""


def main(protocol: BinaryIO) -> int:
    """Answers the ``Score`` on standard input; the exit code."""
    request = Score.model_validate_json(sys.stdin.buffer.read())
    try:
        loaded = load(request.load, lambda _: None)
    except LoadError as error:
        protocol.write(encode(Failed(code=error.code, message=str(error))))
        return 1
    if not loaded.capabilities.logprobs:
        message = "this model is loaded to make vectors of texts, and gives no next token a probability"
        protocol.write(encode(Failed(code="model_load_failed", message=message)))
        return 1
    tokens = tuple(tuple(loaded.tokenizer.encode(prompt)) for prompt in request.prompts)
    longest = loaded.capabilities.context_length - _BEHIND
    for index, sequence in enumerate(tokens):
        if not 0 < len(sequence) <= longest:
            message = f"prompt {index} has {len(sequence)} tokens; 1 to {longest} can be read"
            protocol.write(encode(Failed(code="context_length_exceeded", message=message)))
            return 1
    for index, sequence in enumerate(tokens):
        np.save(Path(request.directory) / f"{index}.npy", log_probabilities(loaded, sequence))
    protocol.write(encode(Scored(tokens=tokens, capabilities=loaded.capabilities, settings=loaded.settings)))
    return 0


def log_probabilities(loaded: Loaded, tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Of every possible next token after each token, shape (len(tokens), n_vocab)."""
    n_vocab = loaded.tokenizer.n_vocab
    choice = Choice(SamplingParams(seed=0, temperature=0), n_prompt=len(tokens))
    reading = Sequence("score", [*tokens, 0], len(tokens) + _BEHIND, choice, prompt_logprobs=n_vocab)
    loaded.core.add(reading)
    found = None
    while found is None:
        found = next((output.prompt_scores for output in loaded.core.step()), None)
    loaded.core.remove(reading.id)
    rows = np.empty((len(tokens), n_vocab), np.float32)
    for row, scores in zip(rows, found, strict=True):
        ids, values = zip(*scores.top, strict=True)
        row[list(ids)] = values
    return rows
