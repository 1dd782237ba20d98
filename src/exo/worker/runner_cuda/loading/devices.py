"""The devices that this llama.cpp build can use on this host, and the answer to --probe."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from exo.worker.protocol.nvidia_driver import Driver, DriverError, driver
from exo.worker.protocol.probe import Device, Probe
from exo.worker.protocol.remote_host import HOST_RAM
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda import plugin, vulkan
from exo.worker.runner_cuda.plugin import PluginError, rpc_function

ENGINE = "llama.cpp"
CUDA, VULKAN = "LlamaCppCuda", "LlamaCppVulkan"
GPU_BACKENDS = {CUDA: "CUDA", VULKAN: "Vulkan"}
"""The card backends of GPUs, and what their plug-ins are called."""
_REGISTRIES = {"CUDA": CUDA, "RPC": CUDA, "Vulkan": VULKAN}
"""ggml's back ends by name; registered RPC servers stand for CUDA's devices in tests."""
_LOADERS = {CUDA: plugin.load_plugin, VULKAN: vulkan.load_vulkan}
PLUGIN_SECONDS = 12
"""For the plug-ins and the drivers; the server waits 15 s for the whole probe."""
LEAST_SECONDS = 2
"""For the second plug-in if the first one has taken all the time."""
_GPU, _INTEGRATED_GPU = 1, 2
"""``enum ggml_backend_dev_type``."""


def probe() -> Probe:
    """Whether llama-cpp-python is installed and loads, and which card backends it serves here.

    A plug-in and the driver under it are tried in a process of their own: a crash or a hang in them costs the GPUs and
    not this answer. Vulkan is tried if it is set up and CUDA gives no device, so no GPU is listed twice.
    """
    try:
        found = _found_here()
    except (ImportError, OSError, RuntimeError) as error:
        note = f"llama-cpp-python does not load: {error}"
        return Probe(installed=False, engine=ENGINE, notes=(note,), remedy="make llama")
    if CUDA in found.backends:
        return found
    deadline = time.monotonic() + PLUGIN_SECONDS
    try:
        if plugin.rpc_servers():
            return probe_plugin(CUDA)
        present = driver()
        if present is not None and present.capabilities:
            return _probed_with_cuda(present, deadline)
        what = "no NVIDIA driver" if present is None else "an NVIDIA driver and no GPU"
        note, remedy = f"there is {what}, so no CUDA device", ""
    except (DriverError, PluginError) as error:
        note, remedy = f"CUDA is not used: {error}", plugin.REMEDY if isinstance(error, PluginError) else ""
    try:
        if vulkan.installed_vulkan() is not None:
            return _probed_apart(VULKAN, deadline).model_copy(update={"notes": (note,), "remedy": remedy})
        others = [each for each in vulkan.vendors_of_gpus() if each != "NVIDIA"]
        offer = (f"{vulkan.REMEDY} makes the GPU of {' and '.join(others)} usable",) if others else ()
    except (DriverError, PluginError) as error:
        offer, remedy = (f"Vulkan is not used: {error}",), remedy or vulkan.REMEDY
    notes = (f"{note}; models run on the CPU", *offer)
    return found.model_copy(update={"notes": notes, "remedy": remedy})


def probe_plugin(backend: str) -> Probe:
    """The answer with the devices of a back end's plug-in, which this process loads. Raises PluginError."""
    _LOADERS[backend]()
    return _found_here()


def _found_here() -> Probe:
    import llama_cpp

    devices = ggml_devices()
    backends = (*GPU_BACKENDS, "LlamaCppCpu")
    present = tuple(each for each in backends if any(device.backend == each for device in devices))
    return Probe(installed=True, engine=ENGINE, version=llama_cpp.__version__, backends=present, devices=devices)


def _probed_with_cuda(present: Driver, deadline: float) -> Probe:
    """Raises PluginError if the plug-in is missing or does not work, DriverError if it works and has no device."""
    known = plugin.read_plugin(plugin.plugin_folder())
    if known is None:
        raise PluginError("an NVIDIA GPU is here, and there is no CUDA plug-in for llama.cpp")
    if why := known.why_not(present):
        raise PluginError(f"the CUDA plug-in ({known.source}) does not fit: {why}")
    return _probed_apart(CUDA, deadline)


def _probed_apart(backend: str, deadline: float) -> Probe:
    """The answer of a process that loads the plug-in. Raises PluginError, and DriverError if it has no device."""
    command = (sys.executable, "-m", "exo.worker.runner_cuda", "--probe-plugin", backend)
    name, left = GPU_BACKENDS[backend], max(LEAST_SECONDS, deadline - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=left)
    except subprocess.TimeoutExpired as error:
        raise PluginError(f"the {name} plug-in did not answer within {left:.0f} s") from error
    if done.returncode < 0:
        signal_name = signal.Signals(-done.returncode).name
        raise PluginError(f"trying the {name} plug-in ended with {signal_name}: {_last_line(done.stderr)}")
    if done.returncode:
        raise PluginError(f"the {name} plug-in does not work: {_last_line(done.stderr)}")
    found = Probe.model_validate_json(done.stdout)
    if backend not in found.backends:
        said = [line for line in done.stderr.splitlines() if b"ggml_cuda_init" in line or b"ggml_vulkan" in line]
        variable = "CUDA_VISIBLE_DEVICES" if backend == CUDA else "GGML_VK_VISIBLE_DEVICES"
        raise DriverError(f"the driver gives {name} no device ({variable}?): {_last_line(b''.join(said[-1:]))}")
    return found


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "nothing on standard error"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process sees. Listing it takes no memory on the device; ``memory`` does."""

    name: str
    """A name such as "CUDA0" or "Vulkan0", on another host "gpu2/CUDA0"."""
    handle: int
    """ggml's handle of the device."""
    splits_rows: bool
    """Whether a matrix can be split by rows between this device and others."""
    copies_weights: bool = False
    """Whether it computes long steps with copies of the weights that are in RAM."""
    cuda: bool = False
    """Whether it is one of CUDA's."""
    remote: bool = False
    """Whether it is reached through a connection (RPC), which only one thread may use."""

    @property
    def logged(self) -> str:
        """The name that llama.cpp's log gives it."""
        return _library().ggml_backend_dev_name(self.handle).decode()

    @property
    def buffers(self) -> str:
        """The name with which llama.cpp's log begins those of its buffers."""
        lib = _library()
        return lib.ggml_backend_buft_name(lib.ggml_backend_dev_buffer_type(self.handle)).decode()

    def memory(self) -> tuple[int, int]:
        """Returns free and total bytes. It starts CUDA on a device, which then keeps several hundred megabytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _library().ggml_backend_dev_memory(self.handle, ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


def gpus(backend: str) -> tuple[Gpu, ...]:
    """Returns the devices of a card backend in its driver's order; none for the CPU.

    Loads the plug-in; raises LoadError if that fails.
    """
    if backend not in GPU_BACKENDS:
        return ()
    try:
        _LOADERS[backend]()
    except PluginError as error:
        raise LoadError("model_load_failed", f"the {GPU_BACKENDS[backend]} plug-in cannot be used: {error}") from error
    lib = _library()
    found: list[Gpu] = []
    for handle in _handles(lib):
        if _backend(lib, handle) == backend:
            registry = lib.ggml_backend_dev_backend_reg(handle)
            splits_rows = bool(lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_split_buffer_type"))
            name, kind = lib.ggml_backend_dev_name(handle).decode(), lib.ggml_backend_reg_name(registry)
            found.append(
                Gpu(
                    name,
                    handle,
                    splits_rows,
                    copies_weights=kind != b"RPC",
                    cuda=kind == b"CUDA",
                    remote=kind == b"RPC",
                )
            )
    return tuple(found)


def far_gpus(server: str, names: Sequence[str]) -> tuple[Gpu, ...]:
    """Connects to the RPC server at "address:port", whose devices get these names. Raises PluginError.

    A byte that is allocated on the first one keeps the connection open, through which all of them are used.
    """
    lib, address = _library(), ctypes.c_void_p
    registry = rpc_function("add_server", address, ctypes.c_char_p)(server.encode())
    handles = [lib.ggml_backend_reg_dev_get(registry, index) for index in range(len(names))]
    lib.ggml_backend_buft_alloc_buffer(lib.ggml_backend_dev_buffer_type(handles[0]), 1)
    return tuple(Gpu(name, handle, splits_rows=False) for name, handle in zip(names, handles, strict=True))


def cpu() -> Gpu:
    """Returns the processors as a device to lend to other hosts."""
    lib = _library()
    lib.ggml_backend_dev_by_name.argtypes, lib.ggml_backend_dev_by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    return Gpu(HOST_RAM, lib.ggml_backend_dev_by_name(b"CPU"), splits_rows=False)


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
                backend=_backend(lib, handle),
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


def _backend(lib: ctypes.CDLL, handle: int) -> str:
    """The card backend that a device serves."""
    registry = lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(handle)).decode()
    is_gpu = lib.ggml_backend_dev_type(handle) in (_GPU, _INTEGRATED_GPU)
    return _REGISTRIES.get(registry, "LlamaCppCpu") if is_gpu else "LlamaCppCpu"


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
        ("ggml_backend_dev_buffer_type", [handle], handle),
        ("ggml_backend_dev_memory", [handle, ctypes.POINTER(size), ctypes.POINTER(size)], None),
        ("ggml_backend_dev_get_props", [handle, ctypes.POINTER(_Properties)], None),
        ("ggml_backend_buft_name", [handle], text),
        ("ggml_backend_buft_alloc_buffer", [handle, size], handle),
        ("ggml_backend_reg_dev_get", [handle, size], handle),
        ("ggml_backend_reg_name", [handle], text),
        ("ggml_backend_reg_get_proc_address", [handle, text], handle),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib
