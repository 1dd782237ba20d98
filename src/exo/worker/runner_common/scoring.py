"""``--score``: writes the log-probabilities of given texts, read through the generate loop's weights and cache."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Capabilities, Failed
from exo.worker.protocol.score import Score, Scored
from exo.worker.protocol.wire import encode
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.tokenizer import Tokenizer

LogProbabilities = npt.NDArray[np.float32]
"""One row for each token of a text: log-probabilities of all tokens as the next one, shape (tokens, n_vocab)."""


@dataclass(frozen=True, slots=True)
class TextReader:
    """A loaded model that reads texts of up to ``longest`` tokens. ``settings`` are those that rounding depends on."""

    tokenizer: Tokenizer
    capabilities: Capabilities
    settings: Mapping[str, str]
    longest: int
    read: Callable[[tuple[int, ...]], LogProbabilities]


def answer_score(protocol: BinaryIO, load: Callable[[Load], TextReader]) -> int:
    """Answers the ``Score`` on standard input; returns the exit status. ``load`` may raise LoadError."""
    request = Score.model_validate_json(sys.stdin.buffer.read())
    try:
        reader = load(request.load)
    except LoadError as error:
        protocol.write(encode(Failed(code=error.code, message=str(error))))
        return 1
    texts = tuple(tuple(reader.tokenizer.encode(prompt)) for prompt in request.prompts)
    for index, tokens in enumerate(texts):
        if not 0 < len(tokens) <= reader.longest:
            message = f"prompt {index} has {len(tokens)} tokens; 1 to {reader.longest} can be read"
            protocol.write(encode(Failed(code="context_length_exceeded", message=message)))
            return 1
    for index, tokens in enumerate(texts):
        np.save(Path(request.directory) / f"{index}.npy", reader.read(tokens))
    protocol.write(encode(Scored(tokens=texts, capabilities=reader.capabilities, settings=reader.settings)))
    return 0


def log_softmax(logits: npt.NDArray[np.float32]) -> LogProbabilities:
    """Returns the log-probabilities of rows of logits, computed in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).astype(np.float32)
