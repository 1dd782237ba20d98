"""``--score``: reads given texts through the same weights, cache and tokenizer as the generate loop."""

from functools import partial

import mlx.core as mx
import numpy as np

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.scoring import LogProbabilities, TextReader, log_softmax
from exo.worker.runner_mlx.loading.estimate import with_choice
from exo.worker.runner_mlx.loading.loader import MlxLoaded, load


def open_reader(command: Load) -> TextReader:
    """Loads the model. Raises LoadError."""
    loaded = load(with_choice(command), lambda _: None)
    longest = loaded.capabilities.context_length
    return TextReader(
        loaded.tokenizer, loaded.capabilities, loaded.settings, longest, partial(_log_probabilities, loaded)
    )


def _log_probabilities(loaded: MlxLoaded, tokens: tuple[int, ...]) -> LogProbabilities:
    """Computes the text in chunks, as prompts are."""
    rows: list[LogProbabilities] = []
    for start in range(0, len(tokens), loaded.chunk):
        chunk = mx.array([tokens[start : start + loaded.chunk]])
        logits = loaded.model.forward(chunk, loaded.cache, [0], [start])
        rows.append(log_softmax(np.array(logits[0].astype(mx.float32), np.float32)))
    return np.concatenate(rows)
