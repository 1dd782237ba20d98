"""What this llama.cpp build can use on this host: ggml's device list, physical cores, and the answer to --probe."""

import ctypes
import os
from pathlib import Path

from exo.worker.messages import Device, Probe

ENGINE = "llama.cpp"
_GPU, _INTEGRATED_GPU = 1, 2
"""``enum ggml_backend_dev_type``."""


def probe() -> Probe:
    """Whether llama-cpp-python is installed and loads, and which card backends it serves here."""
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


def ggml_devices() -> tuple[Device, ...]:
    """Every device of the loaded ggml backends; memory in bytes. The bindings leave these functions out."""
    from llama_cpp.llama_cpp import _lib as lib  # pyright: ignore[reportPrivateUsage]

    handle, text = ctypes.c_void_p, ctypes.c_char_p
    for name, arguments, result in (
        ("ggml_backend_dev_count", [], ctypes.c_size_t),
        ("ggml_backend_dev_get", [ctypes.c_size_t], handle),
        ("ggml_backend_dev_name", [handle], text),
        ("ggml_backend_dev_description", [handle], text),
        ("ggml_backend_dev_type", [handle], ctypes.c_int),
        ("ggml_backend_dev_backend_reg", [handle], handle),
        ("ggml_backend_reg_name", [handle], text),
        ("ggml_backend_dev_memory", [handle, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)], None),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result

    found: list[Device] = []
    for index in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        registry = lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(device)).decode()
        is_gpu = lib.ggml_backend_dev_type(device) in (_GPU, _INTEGRATED_GPU)
        found.append(
            Device(
                name=lib.ggml_backend_dev_name(device).decode(),
                description=lib.ggml_backend_dev_description(device).decode(),
                backend="LlamaCppCuda" if is_gpu and registry == "CUDA" else "LlamaCppCpu",
                memory_total=total.value,
                memory_free=free.value,
            )
        )
    return tuple(found)


def gpu_devices() -> tuple[Device, ...]:
    """The CUDA devices among ``ggml_devices``."""
    return tuple(device for device in ggml_devices() if device.backend == "LlamaCppCuda")


def physical_cores() -> int:
    """Cores this process may run on, hyperthreads counted once: a second thread of a core slows matrix work down."""
    allowed = os.sched_getaffinity(0)
    cores: set[str] = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return max(1, len(cores))
