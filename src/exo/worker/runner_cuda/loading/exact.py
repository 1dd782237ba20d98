"""``exact = true`` in ``[cuda]``: a row of a matrix product does not depend on the number of rows.

llama.cpp chooses a kernel by the number of rows, which is that of all sequences of a step together, and each kernel
adds in another order. On x86-64 these are:

- repacked weights: Q4_K and Q2_K from four rows on, in groups of four (``use_extra_bufts`` in ``model``);
- other K-quants and i-quants: from eight rows on (``GGML_CPU_TILED_MM``);
- F32, F16, BF16 and IQ4_NL weights: from two rows on, which no setting prevents;
- flash attention over keys and values that are both F16 or both F32: for a single sequence with 512 cells or more,
  and for 64 rows of a sequence or more (the cache types in ``options``).
"""

import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import Context, Logits
from exo.worker.runner_cuda.loading.devices import Gpu

_CUTS = 40, 67, 68, 69
_LENGTH = 70


def use_one_kernel(devices: Sequence[Gpu]) -> None:
    """Turns the tiled kernels of this process off, before llama.cpp computes. Raises LoadError for a model on GPUs."""
    if devices:
        raise LoadError("model_misconfigured", 'model card, [cuda] exact: is for the CPU: devices = ["CPU"] chooses it')
    os.environ["GGML_CPU_TILED_MM"] = "0"


def check_exact(context: Context, n_rows: int) -> None:
    """Computes a prompt of up to ``n_rows`` tokens whole and in parts. Raises LoadError if the logits differ."""
    length = min(_LENGTH, n_rows)
    whole = _last_logits(context, (0, length))
    parts = _last_logits(context, (0, *(cut for cut in _CUTS if cut < length), length))
    if not np.array_equal(whole, parts):
        apart = np.abs(whole - parts).max()
        raise LoadError(
            "model_misconfigured",
            f"model card, [cuda] exact: llama.cpp cannot compute this model exactly: logits of a prompt that is cut are"
            f" {apart:.2g} apart; every matrix must be quantised, by another type than IQ4_NL",
        )


def _last_logits(context: Context, cuts: Sequence[int]) -> Logits:
    """Computes tokens in slot 0, one step between two cuts. Leaves the slot empty."""
    batch = context.batch
    for start, stop in pairwise(cuts):
        count = stop - start
        batch.tokens[:count] = np.arange(start, stop) % context.n_vocab
        batch.positions[:count] = range(start, stop)
        batch.slots[:count] = 0
        batch.outputs[:count] = 0
        batch.outputs[count - 1] = 1
        context.decode(count)
    logits = context.logits(1)[0].copy()
    context.trim(0, 0)
    return logits
