"""``--score``: reads given texts through the same weights, cache and tokenizer as the generate loop."""

from functools import partial

import numpy as np

from exo.worker.protocol.commands import Load, SamplingParams
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.scoring import LogProbabilities, TextReader
from exo.worker.runner_vllm.estimate import with_choice
from exo.worker.runner_vllm.loader import VllmLoaded, load
from exo.worker.runner_vllm.sequence import Choice, VllmSequence

_BEHIND = 2
"""Cells that a text needs after its end: the last scored row is that of a token added to the text, and one token is
generated."""


def open_reader(command: Load) -> TextReader:
    """Loads the model. Raises LoadError."""
    loaded = load(with_choice(command), lambda _: None)
    if not loaded.capabilities.logprobs:
        message = "this model is loaded to make vectors of texts, and gives no next token a probability"
        raise LoadError("model_load_failed", message)
    longest = loaded.capabilities.context_length - _BEHIND
    return TextReader(
        loaded.tokenizer, loaded.capabilities, loaded.settings, longest, partial(_log_probabilities, loaded)
    )


def _log_probabilities(loaded: VllmLoaded, tokens: tuple[int, ...]) -> LogProbabilities:
    n_vocab = loaded.tokenizer.n_vocab
    choice = Choice(SamplingParams(seed=0, temperature=0), n_prompt=len(tokens))
    reading = VllmSequence("score", [*tokens, 0], len(tokens) + _BEHIND, choice, prompt_logprobs=n_vocab)
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
