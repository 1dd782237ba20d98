"""The ctypes edge of llama.cpp's multimodal library, which only models with a projector load.

Structures and functions are those of the llama.cpp in llama-cpp-python 0.3.36. The bindings' own module for the library
needs functions that the build leaves out.
"""

import ctypes
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import llama_cpp
import numpy as np

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.bindings import FLASH_ATTENTION
from exo.worker.runner_cuda.loading.devices import Gpu
from exo.worker.runner_cuda.loading.llama_log import Log, load_failure
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.vision.span import EncodedPart, Places


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a picture: the number of its tokens, and by how many positions the text behind it is further on."""

    tokens: int
    positions: int


Piece = list[int] | Extent
"""Token ids, or a part of a picture."""

_MARKER = b"<__media__>"
_TEXT, _IMAGE = 0, 1  # enum mtmd_input_chunk_type


class ProjectorError(Exception):
    """The library did not accept a picture. The message is a phrase."""


class EncodingStoppedError(Exception):
    """Nobody waits for the picture any more."""


_Watch = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
"""``ggml_backend_sched_eval_callback``: gets a node of the graph, and whether it is asked if the next call should tell
that the node is computed. That call returns whether to go on."""
_WATCHED = 32
"""Nodes of the graph that are computed between two such calls. A graph has some hundreds."""


class _Parameters(ctypes.Structure):
    """``struct mtmd_context_params``."""

    _fields_: ClassVar = [
        ("use_gpu", ctypes.c_bool),
        ("device", ctypes.c_void_p),
        ("print_timings", ctypes.c_bool),
        ("n_threads", ctypes.c_int),
        ("image_marker", ctypes.c_char_p),
        ("media_marker", ctypes.c_char_p),
        ("flash_attn_type", ctypes.c_int),
        ("warmup", ctypes.c_bool),
        ("image_min_tokens", ctypes.c_int),
        ("image_max_tokens", ctypes.c_int),
        ("cb_eval", _Watch),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("batch_max_tokens", ctypes.c_int32),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
    ]


class _DecoderPosition(ctypes.Structure):
    """``struct mtmd_decoder_pos``."""

    _fields_: ClassVar = [(name, ctypes.c_uint32) for name in ("t", "x", "y", "z")]


class _InputText(ctypes.Structure):
    """``struct mtmd_input_text``."""

    _fields_: ClassVar = [
        ("text", ctypes.c_char_p),
        ("text_len", ctypes.c_size_t),
        ("add_special", ctypes.c_bool),
        ("parse_special", ctypes.c_bool),
    ]


class Projector:
    """Makes vectors of pictures. ``pieces`` is for any thread, ``encode`` for one at a time."""

    def __init__(self, path: Path, model: Model, device: Gpu | None, threads: int, flash_attn: str, log: Log) -> None:
        """Loads onto ``device``, or into RAM without one, and allocates the memory for a picture.

        Raises LoadError with the library's own last error lines.
        """
        self._lib = _library()
        self._lib.mtmd_log_set(log.callback, None)
        parameters = self._lib.mtmd_context_params_default()
        parameters.use_gpu = device is not None
        parameters.device = None if device is None else device.handle
        parameters.n_threads = threads
        parameters.media_marker = _MARKER
        parameters.flash_attn_type = FLASH_ATTENTION[flash_attn]
        parameters.print_timings = False
        self.n_steps = 0
        """Parts of graphs computed so far."""
        self._n_nodes = 0
        self._goes_on: Callable[[], bool] = lambda: True
        self._watch = _Watch(self._watched)
        parameters.cb_eval = self._watch
        handle = self._lib.mtmd_init_from_file(str(path).encode(), model.handle, parameters)
        if not handle:
            raise load_failure(f"llama.cpp could not load the projector {path}", log)
        self._handle = ctypes.c_void_p(handle)
        self._size = llama_cpp.llama_model_n_embd_inp(model.handle)
        self.whole = bool(self._lib.mtmd_decode_use_non_causal(self._handle, None))
        """Whether each token of a picture sees all of the picture, which is then computed in one step."""
        self.is_flat = bool(self._lib.mtmd_decode_use_mrope(self._handle))
        """Whether the model gives pictures two dimensions (M-RoPE)."""
        if why := self._why_unusable():
            self.free()
            raise LoadError("model_misconfigured", f"model card, [cuda] mmproj: {path} {why}")

    def pieces(self, width: int, height: int) -> list[Piece]:
        """Returns what stands for a picture of this size in a prompt. Raises ProjectorError."""
        with self._chunks(width, height, None) as chunks:
            return [self._piece(chunk) for chunk in chunks]

    def encode(self, width: int, height: int, rgb: bytes, goes_on: Callable[[], bool]) -> list[EncodedPart]:
        """Returns the parts of a picture in their order.

        Gives up as soon as ``goes_on`` returns false. Raises ProjectorError and EncodingStoppedError.
        """
        found: list[EncodedPart] = []
        self._goes_on = goes_on
        with self._chunks(width, height, rgb) as chunks:
            for chunk in chunks:
                piece = self._piece(chunk)
                if isinstance(piece, list):
                    continue
                if self._lib.mtmd_encode_chunk(self._handle, chunk) != 0:
                    raise ProjectorError("llama.cpp could not encode it")
                if not goes_on():
                    raise EncodingStoppedError
                address = self._lib.mtmd_get_output_embd(self._handle)
                vectors = np.ctypeslib.as_array(address, shape=(piece.tokens, self._size)).copy()
                found.append(EncodedPart(vectors, self._places(chunk, piece.tokens) if self.is_flat else None))
        return found

    def free(self) -> None:
        """Frees the projector. Nothing may be encoding."""
        self._lib.mtmd_free(self._handle)

    def _watched(self, _node: int, asks: bool, _: int) -> bool:
        """See ``_Watch``."""
        if asks:
            self._n_nodes += 1
            return self._n_nodes % _WATCHED == 0
        self.n_steps += 1
        return self._goes_on()

    def _why_unusable(self) -> str:
        """Returns why the model cannot see pictures with this projector, as a predicate of it; empty if it can."""
        if not self._lib.mtmd_support_vision(self._handle):
            return "is for sound, and this runner takes pictures only"
        return ""

    def _places(self, chunk: ctypes.c_void_p, count: int) -> Places:
        tokens = self._lib.mtmd_input_chunk_get_tokens_image(chunk)
        found = (self._lib.mtmd_image_tokens_get_decoder_pos(tokens, 0, at) for at in range(count))
        return np.array([(each.t, each.y, each.x, each.z) for each in found], np.int32).T

    @contextmanager
    def _chunks(self, width: int, height: int, rgb: bytes | None) -> Generator[list[ctypes.c_void_p]]:
        """Yields the library's parts of a picture's place in the prompt. Without ``rgb``, they cannot be encoded.

        Raises ProjectorError.
        """
        lib = self._lib
        bitmap = ctypes.c_void_p(lib.mtmd_bitmap_init(width, height, rgb))
        chunks = ctypes.c_void_p(lib.mtmd_input_chunks_init())
        try:
            text = _InputText(_MARKER, len(_MARKER), False, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            if (code := lib.mtmd_tokenize(self._handle, chunks, ctypes.byref(text), bitmaps, 1)) != 0:
                raise ProjectorError(f"llama.cpp could not prepare it (mtmd_tokenize returned {code})")
            count = lib.mtmd_input_chunks_size(chunks)
            yield [ctypes.c_void_p(lib.mtmd_input_chunks_get(chunks, at)) for at in range(count)]
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)

    def _piece(self, chunk: ctypes.c_void_p) -> Piece:
        if self._lib.mtmd_input_chunk_get_type(chunk) != _TEXT:
            count, positions = (
                getattr(self._lib, f"mtmd_input_chunk_get_n_{each}")(chunk) for each in ("tokens", "pos")
            )
            return Extent(count, positions)
        count = ctypes.c_size_t()
        tokens = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        return tokens[: count.value]


def _path() -> Path:
    folder = Path(llama_cpp.__file__).parent / "lib"
    return folder / ("libmtmd.dylib" if sys.platform == "darwin" else "libmtmd.so")


@cache
def _library() -> ctypes.CDLL:
    """Raises LoadError."""
    try:
        lib = ctypes.CDLL(str(_path()))
    except OSError as error:
        message = f"llama.cpp's library for pictures does not load ({error}); `exo setup llama` builds it"
        raise LoadError("model_load_failed", message) from error
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[object, Sequence[object]]] = {
        "mtmd_log_set": (None, (llama_cpp.llama_log_callback, pointer)),
        "mtmd_context_params_default": (_Parameters, ()),
        "mtmd_init_from_file": (pointer, (ctypes.c_char_p, pointer, _Parameters)),
        "mtmd_free": (None, (pointer,)),
        "mtmd_decode_use_non_causal": (ctypes.c_bool, (pointer, pointer)),
        "mtmd_decode_use_mrope": (ctypes.c_bool, (pointer,)),
        "mtmd_support_vision": (ctypes.c_bool, (pointer,)),
        "mtmd_bitmap_init": (pointer, (ctypes.c_uint32, ctypes.c_uint32, ctypes.c_char_p)),
        "mtmd_bitmap_free": (None, (pointer,)),
        "mtmd_input_chunks_init": (pointer, ()),
        "mtmd_input_chunks_size": (size, (pointer,)),
        "mtmd_input_chunks_get": (pointer, (pointer, size)),
        "mtmd_input_chunks_free": (None, (pointer,)),
        "mtmd_input_chunk_get_type": (ctypes.c_int, (pointer,)),
        "mtmd_input_chunk_get_n_tokens": (size, (pointer,)),
        "mtmd_input_chunk_get_n_pos": (ctypes.c_int32, (pointer,)),
        "mtmd_input_chunk_get_tokens_image": (pointer, (pointer,)),
        "mtmd_image_tokens_get_decoder_pos": (_DecoderPosition, (pointer, ctypes.c_int32, size)),
        "mtmd_input_chunk_get_tokens_text": (ctypes.POINTER(ctypes.c_int32), (pointer, ctypes.POINTER(size))),
        "mtmd_tokenize": (
            ctypes.c_int32,
            (pointer, pointer, ctypes.POINTER(_InputText), ctypes.POINTER(pointer), size),
        ),
        "mtmd_encode_chunk": (ctypes.c_int32, (pointer, pointer)),
        "mtmd_get_output_embd": (ctypes.POINTER(ctypes.c_float), (pointer,)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
