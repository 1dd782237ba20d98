"""The ctypes edge: the only file that touches llama.cpp's handles. One thread may use a ``Context``; see ``engine``.

Field names and constants are those of llama-cpp-python 0.3.36; every struct starts from its ``default_params``, since
their layouts change nearly every release.
"""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import llama_cpp
import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.options import CudaOptions, LoadError

Logits = npt.NDArray[np.float32]

CACHE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30,
}  # fmt: skip
"""ggml's type numbers (``enum ggml_type``)."""
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


class EngineError(Exception):
    """llama.cpp failed in a way after which it cannot be trusted; the process ends."""


class Log:
    """Receives llama.cpp's log: warnings and errors go to standard error, the last errors are kept for a diagnosis."""

    WARNING, ERROR = 3, 4
    _callbacks: ClassVar[list[object]] = []
    """llama.cpp keeps the function's address until the process ends, so the function may never be collected."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        callback = llama_cpp.llama_log_callback(self._receive)
        self._callbacks.append(callback)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _: object) -> None:
        if level not in (self.WARNING, self.ERROR):
            return
        line = text.decode(errors="replace").strip()
        sys.stderr.write(line + "\n")
        if level == self.ERROR:
            self.errors = [*self.errors[-9:], line]


class Model:
    """A loaded GGUF: weights and vocabulary."""

    def __init__(self, path: Path, options: CudaOptions, on_progress: Callable[[float], None], log: Log) -> None:
        """Raises LoadError with llama.cpp's own last error lines. ``on_progress`` gets the share done, 0 to 1."""
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers
        params.split_mode = SPLIT_MODES[options.split_mode]
        params.main_gpu = options.main_gpu

        def progress(done: float, _: object) -> bool:
            on_progress(done)
            return True

        callback = llama_cpp.llama_progress_callback(progress)
        params.progress_callback = callback
        if options.n_gpu_layers == 0:
            no_devices = (ctypes.c_void_p * 1)()
            # The bindings declare this field as a bare pointer, which an array does not assign to.
            params.devices = ctypes.cast(no_devices, ctypes.c_void_p)  # pyright: ignore[reportAttributeAccessIssue]
        if options.tensor_split is not None:
            shares = (ctypes.c_float * llama_cpp.llama_max_devices())(*options.tensor_split)
            params.tensor_split = shares
        handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise _load_error(f"llama.cpp could not load {path}", log)
        self.handle = handle
        vocab = llama_cpp.llama_model_get_vocab(handle)
        if vocab is None:
            raise LoadError("model_load_failed", f"{path} has no vocabulary")
        self.vocab = vocab
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.n_layers = llama_cpp.llama_model_n_layer(handle)
        self.n_ctx_train = llama_cpp.llama_model_n_ctx_train(handle)
        self.size_bytes = llama_cpp.llama_model_size(handle)

    def chat_template(self) -> str | None:
        """The file's own template, or None."""
        source = llama_cpp.llama_model_chat_template(self.handle, None)
        return source.decode(errors="replace") if source else None

    def free(self) -> None:
        """Call after every context over this model is freed."""
        llama_cpp.llama_model_free(self.handle)


@dataclass(frozen=True, slots=True)
class Rows:
    """The most rows of one step, of one computation graph (llama.cpp's micro-batch), and that give logits."""

    step: int
    graph: int
    outputs: int


class Batch:
    """One preallocated llama_batch whose arrays are written through numpy; each row belongs to exactly one sequence."""

    def __init__(self, size: int) -> None:
        self.tokens = np.zeros(size, np.int32)
        self.positions = np.zeros(size, np.int32)
        self.slots = np.zeros(size, np.int32)
        self.outputs = np.zeros(size, np.int8)
        self._ones = np.ones(size, np.int32)
        int32_pointer = ctypes.POINTER(ctypes.c_int32)
        address = self.slots.ctypes.data
        self._rows = (int32_pointer * size)(*(ctypes.cast(address + 4 * row, int32_pointer) for row in range(size)))
        self.struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(int32_pointer),
            embd=None,
            pos=self.positions.ctypes.data_as(int32_pointer),
            n_seq_id=self._ones.ctypes.data_as(int32_pointer),
            seq_id=self._rows,
            logits=self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )


class Context:
    """The KV cache and compute buffers for ``slots`` sequences of ``n_ctx`` tokens each.

    The cache is split (``kv_unified`` off): a sequence's logits then do not depend on its slot or its neighbours, which
    a unified cache does not give (8.5 apart on a Q4_K_M model).
    """

    def __init__(self, model: Model, options: CudaOptions, n_ctx: int, rows: Rows, log: Log) -> None:
        """Raises LoadError."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * options.slots
        params.n_seq_max = options.slots
        params.n_batch = rows.step
        params.n_ubatch = rows.graph
        params.n_outputs_max = rows.outputs
        params.kv_unified = False
        params.swa_full = True
        params.n_threads = params.n_threads_batch = options.threads or 1
        params.flash_attn_type = FLASH_ATTENTION[options.flash_attn]
        params.type_k = CACHE_TYPES[options.cache_type_k]
        params.type_v = CACHE_TYPES[options.cache_type_v]
        params.no_perf = True
        handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not handle:
            raise _load_error("llama.cpp could not make a context", log)
        self.handle = handle
        self.n_ctx = llama_cpp.llama_n_ctx_seq(handle)
        self.batch = Batch(rows.step)
        self._n_vocab = model.n_vocab
        memory = llama_cpp.llama_get_memory(handle)
        if memory is None:
            raise LoadError("model_load_failed", "this model has no KV cache, so it cannot generate text")
        self._memory = memory

    def decode(self, n_rows: int) -> None:
        """Computes the batch's first ``n_rows``. Raises EngineError; the context is then unusable."""
        self.batch.struct.n_tokens = n_rows
        code = llama_cpp.llama_decode(self.handle, self.batch.struct)
        if code != 0:
            raise EngineError(f"llama_decode returned {code} for a batch of {n_rows} rows")

    def logits(self, n_outputs: int) -> Logits:
        """A view, shape (n_outputs, n_vocab), of the rows asked for, in batch order; valid until the next decode.

        Waits for the computation to end.
        """
        llama_cpp.llama_synchronize(self.handle)
        address = llama_cpp.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(address, shape=(n_outputs, self._n_vocab))

    def trim(self, slot: int, length: int) -> bool:
        """Keeps the first ``length`` cells of a slot; false where this model's cache cannot be cut there."""
        return llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1)

    def free(self) -> None:
        """Call from the thread that decodes, before the model is freed."""
        llama_cpp.llama_free(self.handle)


def _load_error(what: str, log: Log) -> LoadError:
    detail = "; ".join(log.errors[-3:]) or "it gave no reason"
    low = detail.lower()
    if "out of memory" in low or "failed to allocate" in low or "unable to allocate" in low:
        return LoadError("out_of_memory", f"{what}: not enough memory ({detail})")
    return LoadError("model_load_failed", f"{what}: {detail}")


def engine_version() -> str:
    """Version of llama.cpp and of its bindings, such as "0.5.0-dev+python.0.3.36"."""
    return f"{llama_cpp.llama_version().decode()}+python.{llama_cpp.__version__}"
