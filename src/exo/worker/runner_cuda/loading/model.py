"""llama.cpp's model: weights and vocabulary."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.devices import Gpu
from exo.worker.runner_cuda.loading.llama_log import Log, load_failure
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.loading.placement import experts_of

_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}


class Model:
    """A loaded GGUF."""

    def __init__(
        self,
        path: Path,
        options: CudaOptions,
        devices: Sequence[Gpu],
        on_progress: Callable[[float], None],
        log: Log,
        *,
        head: bool = False,
    ) -> None:
        """Loads onto ``devices``, or into RAM if there are none. ``on_progress`` gets the share done, 0 to 1.

        ``head``: with the head for multi-token prediction. Raises LoadError with llama.cpp's own last error lines.
        """
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers if devices else 0
        params.split_mode = _SPLIT_MODES[options.split_mode if devices else "none"]
        params.load_mtp = head
        params.use_extra_bufts = not options.exact  # repacked weights have other kernels from four rows on
        # Memory-mapped files cannot use huge pages, and stay in RAM beside rearranged weights.
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE

        def progress(done: float, _: object) -> bool:
            on_progress(done)
            return True

        callback = llama_cpp.llama_progress_callback(progress)
        params.progress_callback = callback
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*(each.handle for each in devices), None)
        # The bindings declare this field as a bare pointer, which an array does not assign to.
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)  # pyright: ignore[reportAttributeAccessIssue]
        in_ram = (_Override * 2)()
        if devices and options.cpu_moe:
            in_ram[0] = _Override(experts_of(options.cpu_moe).encode(), _ram())
            # The bindings declare this field as a bare pointer, too.
            params.tensor_buft_overrides = ctypes.cast(in_ram, ctypes.c_void_p)  # pyright: ignore[reportAttributeAccessIssue]
        if options.tensor_split is not None:
            shares = (ctypes.c_float * llama_cpp.llama_max_devices())(*options.tensor_split)
            params.tensor_split = shares
        handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise load_failure(f"llama.cpp could not load {path}", log)
        self.handle = handle
        vocab = llama_cpp.llama_model_get_vocab(handle)
        if vocab is None:
            raise LoadError("model_load_failed", f"{path} has no vocabulary")
        self.vocab = vocab
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.n_layers = llama_cpp.llama_model_n_layer(handle)
        self.n_ctx_train = llama_cpp.llama_model_n_ctx_train(handle)
        self.size_bytes = llama_cpp.llama_model_size(handle)
        names = {each.logged: each.name for each in devices}
        self.layers = {names.get(place, place): count for place, count in log.layers.items()}
        self.experts_in_ram = log.experts_in_ram
        self.adapters: dict[str, llama_cpp.llama_adapter_lora_p] = {}
        """The handle of each adapter, by what identifies it in an ``adapter_key``."""
        self.can_cut = not llama_cpp.llama_model_is_recurrent(handle) and not llama_cpp.llama_model_is_hybrid(handle)
        """Whether a sequence's last tokens can be removed from the cache."""
        self.window = llama_cpp.llama_model_n_swa(handle)
        """The number of tokens that sliding-window layers see; 0 without such layers."""
        self.window_is_chunk = self.metadata("general.architecture") == "llama4"
        """Whether a token sees those of its own chunk of ``window`` tokens, instead of the last ``window`` ones."""

    def chat_template(self, name: bytes | None = None) -> str | None:
        """The chat template in the file, the usual one without a ``name``, or None."""
        source = llama_cpp.llama_model_chat_template(self.handle, name)
        return source.decode(errors="replace") if source else None

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text, or None. "{arch}" in the key stands for the architecture's name."""
        if "{arch}" in key:
            key = key.replace("{arch}", self.metadata("general.architecture") or "")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            # The bindings declare bytes, which cannot be written to.
            length = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)  # pyright: ignore[reportArgumentType]
            if length < size:
                return None if length < 0 else buffer.value.decode(errors="replace")
            size = length + 1

    def add_adapter(self, path: Path, identity: str, log: Log) -> None:
        """Loads an adapter, unless it is loaded. Contexts must be made later. Raises LoadError."""
        if identity in self.adapters:
            return
        handle = llama_cpp.llama_adapter_lora_init(self.handle, str(path).encode())
        if not handle:
            raise load_failure(f"llama.cpp could not load the adapter {path}", log)
        self.adapters[identity] = handle

    def free(self) -> None:
        """Frees the model and its adapters. Call it after every context over this model is freed."""
        llama_cpp.llama_model_free(self.handle)


class _Override(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``: the type of buffer for tensors whose names match a pattern."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _ram() -> int:
    """Returns ggml's handle of the type of buffers in RAM."""
    from llama_cpp.llama_cpp import _lib as lib  # pyright: ignore[reportPrivateUsage]

    lib.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    return lib.ggml_backend_cpu_buffer_type()
