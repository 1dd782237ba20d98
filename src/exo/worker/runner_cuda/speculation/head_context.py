"""The ctypes edge of a model's head for multi-token prediction.

Written for llama.cpp 0.5.0-dev, whose functions for heads are outside its stable interface.
"""

import ctypes

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp_ext

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import Batch, Context, EngineError, Logits, context_params
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions

States = npt.NDArray[np.float32]
"""States of tokens behind the model's last layer, shape (rows, width)."""


def keep_states(context: Context) -> None:
    """Has a model's context keep the state of every row of a step."""
    llama_cpp_ext.llama_set_embeddings_nextn(context.handle, True, False)


def states(context: Context, n_rows: int, width: int) -> States:
    """Returns a view of the states of the last step's rows, in batch order; valid until the next decode."""
    address = llama_cpp_ext.llama_get_embeddings_nextn(context.handle)
    return np.ctypeslib.as_array(address, shape=(n_rows, width))


class HeadContext:
    """The head's own KV cache, with ``n_ctx`` cells for each slot, and its compute buffers.

    A row has a token and the state of the token before it.
    """

    def __init__(self, model: Model, options: CudaOptions, n_ctx: int, n_rows: int) -> None:
        """A step has up to ``n_rows``, of which one of each slot may give logits. Raises LoadError."""
        params = context_params(options)
        params.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_MTP
        params.n_ctx = n_ctx * options.slots
        params.n_seq_max = params.n_outputs_max = options.slots
        params.n_batch = params.n_ubatch = n_rows
        params.kv_unified = False
        handle = llama_cpp.llama_init_from_model(model.handle, params)
        memory = llama_cpp.llama_get_memory(handle) if handle else None
        if not handle or memory is None:
            raise LoadError("model_load_failed", "llama.cpp could not make a context for the model's head")
        self._handle = handle
        self._memory = memory
        self._n_vocab = model.n_vocab
        self.width = llama_cpp.llama_model_n_embd_out(model.handle)
        self.batch = Batch(n_rows)
        self.states = np.zeros((n_rows, self.width), np.float32)
        """Written like the batch's arrays."""
        # The bindings declare this field as an array.
        self.batch.struct.embd = self.states.ctypes.data_as(ctypes.POINTER(ctypes.c_float))  # pyright: ignore[reportAttributeAccessIssue]
        llama_cpp_ext.llama_set_embeddings_nextn(handle, True, True)

    def use_threads(self, one_row: int, more: int) -> None:
        """Sets the number of CPU threads for steps of one row and for steps of more."""
        llama_cpp.llama_set_n_threads(self._handle, one_row, more)

    def decode(self, n_rows: int) -> None:
        """Computes the batch's first ``n_rows`` and waits for the end. Raises EngineError: the context is unusable."""
        self.batch.struct.n_tokens = n_rows
        code = llama_cpp.llama_decode(self._handle, self.batch.struct)
        if code != 0:
            raise EngineError(f"llama_decode returned {code} for {n_rows} rows of the model's head")
        llama_cpp.llama_synchronize(self._handle)

    def outputs(self, n_outputs: int) -> tuple[Logits, States]:
        """Returns views of the output rows' logits and states, in batch order; valid until the next decode."""
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._handle), shape=(n_outputs, self._n_vocab))
        found = llama_cpp_ext.llama_get_embeddings_nextn(self._handle)
        return logits, np.ctypeslib.as_array(found, shape=(n_outputs, self.width))

    def trim(self, slot: int, position: int) -> None:
        """Drops a slot's cells from a position on."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, position, -1)

    def clear(self) -> None:
        """Empties the cache, and overwrites its content, which may contain NaN."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def free(self) -> None:
        """Frees the context. Call it from the thread that decodes, before the model is freed."""
        llama_cpp.llama_free(self._handle)
