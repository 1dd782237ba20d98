"""llama.cpp's context for embeddings and reranking."""

import llama_cpp
import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.bindings import Batch, EngineError, context_params
from exo.worker.runner_cuda.loading.llama_log import Log, load_failure
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions, Pooling

Vector = npt.NDArray[np.float32]

POOLING: dict[Pooling, int] = {"mean": 1, "cls": 2, "last": 3, "rank": 4}
"""``enum llama_pooling_type``."""


class PooledContext:
    """Computes vectors or scores of up to ``n_texts`` texts at a time, with the weights that generation uses.

    Each text is a sequence, numbered from 0. They share one unified cache, which is emptied after each group of texts.
    """

    def __init__(
        self, model: Model, options: CudaOptions, pooling: Pooling, n_cells: int, n_rows: int, n_texts: int, log: Log
    ) -> None:
        """The cache holds ``n_cells`` tokens. A batch has up to ``n_rows``. Raises LoadError."""
        params = context_params(options)
        params.n_ctx = n_cells
        params.n_seq_max = n_texts
        params.n_batch = params.n_ubatch = n_rows
        params.kv_unified = True
        params.embeddings = True
        params.pooling_type = POOLING[pooling]
        handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not handle:
            raise load_failure("llama.cpp could not make a context for embeddings", log)
        self.handle = handle
        self.batch = Batch(n_rows)
        self.batch.outputs[:] = 1
        self.size = 1 if pooling == "rank" else llama_cpp.llama_model_n_embd_out(model.handle)
        """The length of the vector that ``pooled`` returns."""
        self._memory = llama_cpp.llama_get_memory(handle)

    def use_threads(self, count: int) -> None:
        """Sets the number of CPU threads."""
        llama_cpp.llama_set_n_threads(self.handle, count, count)

    def compute(self, n_rows: int) -> None:
        """Computes the batch's first ``n_rows``. Raises EngineError: the context is unusable then."""
        self.batch.struct.n_tokens = n_rows
        code = llama_cpp.llama_decode(self.handle, self.batch.struct)
        if code != 0:
            raise EngineError(f"llama_decode returned {code} for {n_rows} rows to embed")

    def pooled(self, text: int) -> Vector:
        """Returns the pooled vector of a text's rows in the last batch, as a copy. Waits for the computation to end."""
        address = llama_cpp.llama_get_embeddings_seq(self.handle, text)
        return np.ctypeslib.as_array(address, shape=(self.size,)).copy()

    def clear(self, *, data: bool) -> None:
        """Empties the cache. With ``data``, also overwrites its content, which may contain NaN."""
        if self._memory is not None:
            llama_cpp.llama_memory_clear(self._memory, data)

    def free(self) -> None:
        """Frees the context. Call it from the thread that computes, before the model is freed."""
        llama_cpp.llama_free(self.handle)
