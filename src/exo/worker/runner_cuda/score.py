"""``--score``: reads given texts through the same weights, context and tokenizer as the generate loop."""

from functools import partial

import numpy as np

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.scoring import LogProbabilities, TextReader, log_softmax
from exo.worker.runner_cuda.bindings import Context
from exo.worker.runner_cuda.loading.estimate import with_choice
from exo.worker.runner_cuda.loading.inputs import read_options
from exo.worker.runner_cuda.loading.loader import Loaded, load


def open_reader(command: Load) -> TextReader:
    """Loads the model. Raises LoadError."""
    loaded = load(with_choice(command), lambda _: None, score=True)
    options = read_options(command)
    settings = {
        "flash attention": options.flash_attn,
        "KV cache": f"{options.cache_type_k}/{options.cache_type_v}",
        "prompt chunk": str(loaded.chunk),
        "threads": str(options.threads),
    }
    longest = loaded.context.n_ctx
    return TextReader(loaded.tokenizer, loaded.capabilities, settings, longest, partial(log_probabilities, loaded))


def log_probabilities(loaded: Loaded, tokens: tuple[int, ...]) -> LogProbabilities:
    """Computes the log-probabilities of every possible next token after each token, in chunks as prompts are."""
    rows: list[LogProbabilities] = []
    for start in range(0, len(tokens), loaded.chunk):
        rows.append(_chunk(loaded.context, tokens[start : start + loaded.chunk], start))
    loaded.context.trim(0, 0)
    return np.concatenate(rows)


def _chunk(context: Context, tokens: tuple[int, ...], start: int) -> LogProbabilities:
    batch, n = context.batch, len(tokens)
    batch.tokens[:n] = tokens
    batch.positions[:n] = range(start, start + n)
    batch.slots[:n] = 0
    batch.outputs[:n] = 1
    context.decode(n)
    return log_softmax(context.logits(n))
