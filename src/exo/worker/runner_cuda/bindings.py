"""llama.cpp's context for generation. Only one thread may use a ``Context``.

The ctypes edge consists of this file, ``model``, ``pooled_context``, ``llama_log``, ``device_chains`` and
``head_context``, which own llama.cpp's handles.

Field names and constants are those of llama-cpp-python 0.3.36. Every struct starts from its ``default_params``, because
the layouts change in nearly every release.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
import numpy.typing as npt

from exo.worker.runner_cuda.adapter_key import adapters_of
from exo.worker.runner_cuda.loading.llama_log import Log, load_failure
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.prefix.moved import Move, in_order
from exo.worker.runner_cuda.prefix.state import State, new_state
from exo.worker.runner_cuda.vision.span import Places, Vectors

Logits = npt.NDArray[np.float32]

CACHE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30,
}  # fmt: skip
"""ggml's type numbers (``enum ggml_type``)."""
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


class EngineError(Exception):
    """llama.cpp failed and can no longer be trusted, so the process must end."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Limits on the number of batch rows."""

    step: int
    graph: int
    """The most rows of one computation graph (llama.cpp's micro-batch)."""
    outputs: int
    """The most rows of a step that give logits."""
    reduced: int = 1
    """The most rows of one sequence that give logits, if a sampler chain reduces them."""


class Batch:
    """A preallocated llama_batch whose arrays are written through numpy. Each row belongs to exactly one sequence."""

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

    def with_vectors(self, vectors: Vectors, places: Places | None) -> llama_cpp.llama_batch:
        """Returns a batch of the same rows with vectors instead of tokens, and perhaps other positions.

        Both must outlast it.
        """
        own = self.struct
        return llama_cpp.llama_batch(
            token=None,
            embd=vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=own.pos if places is None else places.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=own.n_seq_id,
            seq_id=own.seq_id,
            logits=own.logits,
        )


class Context:
    """The KV cache and compute buffers for ``slots`` sequences.

    A split cache has ``n_ctx`` cells for each of them, so that a sequence's logits do not depend on its slot or its
    neighbours. In a pool (llama.cpp's ``kv_unified``) all of them share ``n_ctx`` cells.
    """

    def __init__(self, model: Model, options: CudaOptions, n_ctx: int, rows: Rows, log: Log) -> None:
        """Raises LoadError."""
        params = context_params(options)
        self.is_pool = options.kv == "pool"
        params.n_ctx = n_ctx if self.is_pool else n_ctx * options.slots
        moves = options.cache_reuse is not None
        params.n_seq_max = options.slots + moves  # one more sequence holds cells that are aside
        params.n_batch = rows.step
        params.n_ubatch = rows.graph
        params.n_outputs_max = rows.outputs
        params.n_outputs_max_per_seq = rows.reduced
        params.kv_unified = self.is_pool or moves  # ``cache_reuse`` demands a single slot
        params.n_rs_seq = 0 if model.can_cut else options.rollback
        handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not handle:
            raise load_failure("llama.cpp could not make a context", log)
        self.handle = handle
        self.n_ctx = llama_cpp.llama_n_ctx_seq(handle)
        self.batch = Batch(rows.step)
        self.n_vocab = model.n_vocab
        self._memory = llama_cpp.llama_get_memory(handle)
        self.generates = self._memory is not None and llama_cpp.llama_get_causal_attn(handle)
        """False for an encoder, which computes only vectors of whole texts. llama.cpp reports this of a context, not of
        a model."""
        self._model = model
        self.can_cut = model.can_cut
        self.forgets = not model.can_cut or model.window > 0
        """Whether some layers keep only a window of cells or a recurrent state, also in a saved state."""
        self.rollback = sys.maxsize if model.can_cut else llama_cpp.llama_n_rs_seq(handle)
        """The most tokens of the last step that can be removed from a slot."""
        self._adapters = ""
        self.position: Callable[[int, int], int] = lambda _, length: length
        """Returns the position after a slot's first so many tokens. A picture's tokens may share positions."""
        self._aside = options.slots  # the sequence that holds cells which are aside
        self._shifted = False  # cells have new positions, and llama.cpp will rotate their keys with the next decode
        self._rolled_back = set[int]()  # slots whose recurrent state is an earlier one until their next decode

    def decode(self, n_rows: int) -> None:
        """Computes the batch's first ``n_rows`` and waits for the end. Raises EngineError: the context is unusable."""
        self._decode(self.batch.struct, n_rows)

    def decode_vectors(self, vectors: Vectors, places: Places | None, *, causal: bool) -> None:
        """Computes as many of the batch's first rows as there are vectors, which take the place of tokens.

        ``places`` replace the positions. Without ``causal``, each row also attends to those after it. Raises
        EngineError.
        """
        vectors = np.ascontiguousarray(vectors)
        places = None if places is None else np.ascontiguousarray(places)
        llama_cpp.llama_set_causal_attn(self.handle, causal)
        self._decode(self.batch.with_vectors(vectors, places), len(vectors))
        llama_cpp.llama_set_causal_attn(self.handle, True)

    def decode_one(self) -> None:
        """Computes one token and forgets it, so that weights are paged in and kernels built."""
        batch = self.batch
        batch.tokens[0] = batch.positions[0] = batch.slots[0] = 0
        batch.outputs[0] = 1
        self.decode(1)
        self.logits(1)
        self.trim(0, 0)

    def _decode(self, batch: llama_cpp.llama_batch, n_rows: int) -> None:
        batch.n_tokens = n_rows
        if self._rolled_back:
            self._rolled_back.difference_update(self.batch.slots[:n_rows].tolist())
        code = llama_cpp.llama_decode(self.handle, batch)
        if code != 0:
            raise EngineError(f"llama_decode returned {code} for a batch of {n_rows} rows")
        llama_cpp.llama_synchronize(self.handle)
        self._shifted = False

    def logits(self, n_outputs: int) -> Logits:
        """Returns a view (n_outputs, n_vocab) of the output rows in batch order; valid until the next decode."""
        address = llama_cpp.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(address, shape=(n_outputs, self.n_vocab))

    def use_adapters(self, key: str) -> None:
        """Has the next steps computed with the adapters of an ``adapter_key``, or without any if it is empty."""
        if key == self._adapters:
            return
        used = adapters_of(key)
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(used))(*(self._model.adapters[each] for each, _ in used))
        scales = (ctypes.c_float * len(used))(*(scale for _, scale in used))
        # The bindings declare the array without the type of its elements.
        llama_cpp.llama_set_adapters_lora(self.handle, handles, len(used), scales)  # pyright: ignore[reportUnknownMemberType]
        self._adapters = key

    def use_threads(self, one_row: int, more: int) -> None:
        """Sets the number of CPU threads for steps of one row and for steps of more."""
        llama_cpp.llama_set_n_threads(self.handle, one_row, more)

    def least(self, slot: int) -> int:
        """Returns the length of the shortest prefix, other than the empty one, to which a slot's cells can be cut.

        The next token sees ``window`` tokens, itself included.
        """
        assert self._memory is not None
        model, lowest = self._model, llama_cpp.llama_memory_seq_pos_min(self._memory, slot)
        if not model.can_cut or not model.window:
            return self._length_at(slot, lowest + 1) if lowest > 0 or not model.can_cut else 0
        if model.window_is_chunk:
            return -(-lowest // model.window) * model.window
        return self._length_at(slot, lowest + model.window - 1) if lowest > 0 else 0

    def _length_at(self, slot: int, position: int) -> int:
        """Returns the fewest of a slot's tokens after which a position is reached."""
        length = position
        while (missing := position - self.position(slot, length)) > 0:
            length += missing
        return length

    def least_saved(self, length: int) -> int:
        """Returns the same of a saved state or a snapshot of ``length`` tokens.

        llama.cpp saves the cells that the last token saw, so that token can be computed again.
        """
        if not self._model.can_cut:
            return length
        return length - 1 if length > self._model.window else 0

    def length(self, slot: int) -> int:
        """Returns the number of tokens that a slot's cells are for."""
        return 0 if self._memory is None else llama_cpp.llama_memory_seq_pos_max(self._memory, slot) + 1

    def trim(self, slot: int, length: int) -> bool:
        """Keeps the first ``length`` cells of a slot. Returns false if this model's cache cannot be cut there."""
        if self._memory is None:
            return False
        position = self.position(slot, length)
        goes_back = not self.can_cut and position <= llama_cpp.llama_memory_seq_pos_max(self._memory, slot)
        trimmed = llama_cpp.llama_memory_seq_rm(self._memory, slot, position, -1)
        if goes_back and trimmed:
            self._rolled_back.add(slot)
        if not length:
            self._rolled_back.discard(slot)
        return trimmed

    def copy(self, source: int, target: int) -> None:
        """Copies all cells of one slot to another. A split cache cannot copy fewer. In a pool, both then share them.

        llama.cpp copies with the next decode, before it computes. If the source's cells are overwritten before that by
        other means than a decode, the new content is copied. Raises EngineError.
        """
        assert self._memory is not None
        if target in self._rolled_back or self.is_pool:
            self.trim(target, 0)
        if source in self._rolled_back:  # llama.cpp would copy the state before the rollback
            if not self.restore(target, self.save(source, sys.maxsize)):
                raise EngineError(f"the state of slot {source} could not be copied")
        else:
            llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def wipe(self, slot: int, sound: int | None) -> None:
        """Empties a slot and overwrites its cells with those of the slot ``sound``, with the next decode.

        If ``sound`` is None, all slots are emptied and filled with zeros at once. A pool allows nothing else.
        """
        assert self._memory is not None
        if sound is None:
            llama_cpp.llama_memory_clear(self._memory, True)
            return
        self.copy(sound, slot)
        self.trim(slot, 0)

    def save(self, slot: int, most: int) -> State:
        """Returns the cells of a slot; an empty array if that failed or they take more than ``most`` bytes.

        Layers with a sliding window contribute only the cells that the last token saw.
        """
        return self._get(slot, most, 0)

    def restore(self, slot: int, state: State) -> bool:
        """Replaces a slot's cells with saved ones. On failure, returns false and leaves the slot empty."""
        return self._set(slot, state, 0)

    def snapshot(self, slot: int, most: int) -> State:
        """Returns the part of a slot's cells in layers that forget; an empty array as in ``save``."""
        return self._get(slot, most, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    def rewind(self, slot: int, state: State) -> bool:
        """Replaces that part with a snapshot. On failure, returns false and leaves the slot empty.

        The caller then cuts the slot to a length of the snapshot.
        """
        return self._set(slot, state, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    @property
    def can_shift(self) -> bool:
        """Whether cells can be used at other positions: each layer has all cells, and keys are rotated by position."""
        rotates = llama_cpp.llama_model_rope_type(self._model.handle) != llama_cpp.LLAMA_ROPE_TYPE_NONE
        if self._memory is None or self.forgets or not rotates:
            return False
        return llama_cpp.llama_memory_can_shift(self._memory)

    def set_aside(self, slot: int, length: int, moves: Sequence[Move]) -> None:
        """Cuts a slot to ``length``, and keeps the cells of ``moves`` aside, rotated to their new positions."""
        assert self._memory is not None
        for move in moves:
            end = move.source + move.length
            llama_cpp.llama_memory_seq_cp(self._memory, slot, self._aside, move.source, end)
        self.trim(slot, length)
        for move in in_order(moves):
            end = move.source + move.length
            llama_cpp.llama_memory_seq_add(self._memory, self._aside, move.source, end, move.shift)
        self._shifted = True

    def attach(self, slot: int, move: Move) -> None:
        """Puts the cells of a move that were set aside into the slot, which must end where they begin."""
        assert self._memory is not None
        place = move.target, move.target + move.length
        llama_cpp.llama_memory_seq_cp(self._memory, self._aside, slot, *place)
        llama_cpp.llama_memory_seq_rm(self._memory, self._aside, *place)

    def drop_aside(self) -> None:
        """Frees all cells that are aside."""
        self.trim(self._aside, 0)

    def _get(self, slot: int, most: int, flags: int) -> State:
        if self._shifted:
            return np.empty(0, np.uint8)
        part = ctypes.c_int32(slot), ctypes.c_uint32(flags)
        size = llama_cpp.llama_state_seq_get_size_ext(self.handle, *part)
        if not 0 < size <= most:
            return np.empty(0, np.uint8)
        state = new_state(size)
        array = (ctypes.c_uint8 * size).from_buffer(state.data)
        return state[: llama_cpp.llama_state_seq_get_data_ext(self.handle, array, size, *part)]

    def _set(self, slot: int, state: State, flags: int) -> bool:
        part = ctypes.c_int32(slot), ctypes.c_uint32(flags)
        if state.size:
            array = (ctypes.c_uint8 * state.size).from_buffer(state.data)
            if llama_cpp.llama_state_seq_set_data_ext(self.handle, array, state.size, *part) == state.size:
                self._rolled_back.discard(slot)
                return True
        self.trim(slot, 0)
        return False

    def free(self) -> None:
        """Frees the context. Call it from the thread that decodes, before the model is freed."""
        llama_cpp.llama_free(self.handle)


def context_params(options: CudaOptions) -> llama_cpp.llama_context_params:
    """Returns the parameters that all contexts of a model share."""
    params = llama_cpp.llama_context_default_params()
    params.swa_full = options.swa_full
    params.n_threads = options.threads or 1
    params.n_threads_batch = options.threads_batch or params.n_threads
    params.flash_attn_type = FLASH_ATTENTION["on" if options.exact else options.flash_attn]
    params.type_k = CACHE_TYPES[options.cache_type_k]
    params.type_v = CACHE_TYPES[options.cache_type_v]
    params.no_perf = True
    return params


def engine_version() -> str:
    """Returns the versions of llama.cpp and of its bindings, such as "0.5.0-dev+python.0.3.36"."""
    return f"{llama_cpp.llama_version().decode()}+python.{llama_cpp.__version__}"
