"""The devices that this llama.cpp build can use on this host, and the answer to --probe."""

import ctypes
from dataclasses import dataclass

from exo.worker.protocol.messages import Device, Probe

ENGINE = "llama.cpp"
_GPU, _INTEGRATED_GPU = 1, 2
"""``enum ggml_backend_dev_type``."""


def probe() -> Probe:
    """Reports whether llama-cpp-python loads, and which card backends it serves on this host."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        return Probe(
            installed=False,
            engine=ENGINE,
            notes=(f"llama-cpp-python does not load: {error}",),
            remedy="make llama",
        )
    devices = ggml_devices()
    cuda = any(device.backend == "LlamaCppCuda" for device in devices)
    notes: tuple[str, ...] = ()
    remedy = ""
    if not cuda:
        built = llama_cpp.llama_supports_gpu_offload()
        notes = (
            "this llama.cpp build has CUDA but sees no device; is the NVIDIA driver loaded?"
            if built
            else "this llama.cpp build has no CUDA; models run on the CPU",
        )
        remedy = "" if built else "make llama CUDA=1"
    return Probe(
        installed=True,
        engine=ENGINE,
        version=llama_cpp.__version__,
        backends=("LlamaCppCuda", "LlamaCppCpu") if cuda else ("LlamaCppCpu",),
        devices=devices,
        notes=notes,
        remedy=remedy,
    )


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device that this process sees. Listing it takes no memory on the device; ``memory`` does."""

    name: str
    """A name such as "CUDA0"."""
    handle: int
    """ggml's handle of the device."""
    splits_rows: bool
    """Whether a matrix can be split by rows between this device and others."""

    def memory(self) -> tuple[int, int]:
        """Returns free and total bytes. It starts CUDA on the device, which then keeps several hundred megabytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _library().ggml_backend_dev_memory(self.handle, ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices, in CUDA's order."""
    lib = _library()
    found: list[Gpu] = []
    for handle in _handles(lib):
        if _is_cuda(lib, handle):
            registry = lib.ggml_backend_dev_backend_reg(handle)
            splits_rows = bool(lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_split_buffer_type"))
            found.append(Gpu(lib.ggml_backend_dev_name(handle).decode(), handle, splits_rows))
    return tuple(found)


def ggml_devices() -> tuple[Device, ...]:
    """Returns every device of the loaded ggml backends. It takes memory on each; see ``Gpu.memory``."""
    lib = _library()
    found: list[Device] = []
    for handle in _handles(lib):
        about = _Properties()
        lib.ggml_backend_dev_get_props(handle, ctypes.byref(about))
        found.append(
            Device(
                name=lib.ggml_backend_dev_name(handle).decode(),
                description=lib.ggml_backend_dev_description(handle).decode(),
                backend="LlamaCppCuda" if _is_cuda(lib, handle) else "LlamaCppCpu",
                memory_total=about.memory_total,
                memory_free=about.memory_free,
                address=(about.device_id or b"").decode(),
            )
        )
    return tuple(found)


class _Properties(ctypes.Structure):
    """``struct ggml_backend_dev_props``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("capabilities", ctypes.c_bool * 32),  # five flags, and room for later ones
    )
    memory_free: int
    memory_total: int
    device_id: bytes | None


def _handles(lib: ctypes.CDLL) -> list[int]:
    return [lib.ggml_backend_dev_get(index) for index in range(lib.ggml_backend_dev_count())]


def _is_cuda(lib: ctypes.CDLL, handle: int) -> bool:
    registry = lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(handle)).decode()
    return lib.ggml_backend_dev_type(handle) in (_GPU, _INTEGRATED_GPU) and registry == "CUDA"


def _library() -> ctypes.CDLL:
    """Returns llama.cpp's library with the signatures of ggml's device functions, which the bindings lack."""
    from llama_cpp.llama_cpp import _lib as lib  # pyright: ignore[reportPrivateUsage]

    handle, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    for name, arguments, result in (
        ("ggml_backend_dev_count", [], size),
        ("ggml_backend_dev_get", [size], handle),
        ("ggml_backend_dev_name", [handle], text),
        ("ggml_backend_dev_description", [handle], text),
        ("ggml_backend_dev_type", [handle], ctypes.c_int),
        ("ggml_backend_dev_backend_reg", [handle], handle),
        ("ggml_backend_dev_memory", [handle, ctypes.POINTER(size), ctypes.POINTER(size)], None),
        ("ggml_backend_dev_get_props", [handle, ctypes.POINTER(_Properties)], None),
        ("ggml_backend_reg_name", [handle], text),
        ("ggml_backend_reg_get_proc_address", [handle, text], handle),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib
