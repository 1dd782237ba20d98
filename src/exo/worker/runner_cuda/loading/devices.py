"""The devices that this llama.cpp build can use on this host, and the answer to --probe."""

import ctypes
import signal
import subprocess
import sys
from dataclasses import dataclass

from exo.worker.protocol.nvidia_driver import Driver, DriverError, driver
from exo.worker.protocol.one_shot import Device, Probe
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda import plugin
from exo.worker.runner_cuda.plugin import PluginError

ENGINE = "llama.cpp"
PLUGIN_SECONDS = 12
"""For the plug-in and the driver; the server waits 15 s for the whole probe."""
_GPU, _INTEGRATED_GPU = 1, 2
"""``enum ggml_backend_dev_type``."""


def probe() -> Probe:
    """Whether llama-cpp-python is installed and loads, and which card backends it serves here.

    The CUDA plug-in and the driver under it are tried in a process of their own: a crash or a hang in them costs the
    GPUs and not this answer.
    """
    try:
        found = _found_here()
    except (ImportError, OSError, RuntimeError) as error:
        note = f"llama-cpp-python does not load: {error}"
        return Probe(installed=False, engine=ENGINE, notes=(note,), remedy="make llama")
    if "LlamaCppCuda" in found.backends:
        return found
    try:
        if plugin.rpc_servers():
            return probe_plugin()
        present = driver()
        if present is None or not present.capabilities:
            what = "no NVIDIA driver" if present is None else "an NVIDIA driver and no GPU"
            return found.model_copy(update={"notes": (f"there is {what}, so no CUDA device; models run on the CPU",)})
        return _probed_with_plugin(present)
    except (DriverError, PluginError) as error:
        notes = (f"CUDA is not used, models run on the CPU: {error}",)
        remedy = plugin.REMEDY if isinstance(error, PluginError) else ""
        return found.model_copy(update={"notes": notes, "remedy": remedy})


def probe_plugin() -> Probe:
    """The answer with the plug-in's devices. Loads the plug-in into this process. Raises PluginError."""
    plugin.load_plugin()
    return _found_here()


def _found_here() -> Probe:
    import llama_cpp

    devices = ggml_devices()
    backends = ("LlamaCppCuda", "LlamaCppCpu")
    present = tuple(each for each in backends if any(device.backend == each for device in devices))
    return Probe(installed=True, engine=ENGINE, version=llama_cpp.__version__, backends=present, devices=devices)


def _probed_with_plugin(present: Driver) -> Probe:
    """Raises PluginError if the plug-in is missing or does not work, DriverError if it works and has no device."""
    known = plugin.read_plugin(plugin.plugin_folder())
    if known is None:
        raise PluginError("an NVIDIA GPU is here, and there is no CUDA plug-in for llama.cpp")
    if why := known.why_not(present):
        raise PluginError(f"the CUDA plug-in ({known.source}) does not fit: {why}")
    command = (sys.executable, "-m", "exo.worker.runner_cuda", "--probe-plugin")
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=PLUGIN_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise PluginError(f"the CUDA plug-in did not answer within {PLUGIN_SECONDS} s") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise PluginError(f"trying the CUDA plug-in ended with {name}: {_last_line(done.stderr)}")
    if done.returncode:
        raise PluginError(f"the CUDA plug-in does not work: {_last_line(done.stderr)}")
    found = Probe.model_validate_json(done.stdout)
    if "LlamaCppCuda" not in found.backends:
        said = [line for line in done.stderr.splitlines() if b"ggml_cuda_init" in line]
        raise DriverError(f"the driver gives CUDA no device (CUDA_VISIBLE_DEVICES?): {_last_line(b''.join(said[-1:]))}")
    return found


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "nothing on standard error"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device that this process sees. Listing it takes no memory on the device; ``memory`` does."""

    name: str
    """A name such as "CUDA0"."""
    handle: int
    """ggml's handle of the device."""
    splits_rows: bool
    """Whether a matrix can be split by rows between this device and others."""
    copies_weights: bool = False
    """Whether it computes long steps with copies of the weights that are in RAM."""

    @property
    def buffers(self) -> str:
        """The name with which llama.cpp's log begins those of its buffers."""
        lib = _library()
        return lib.ggml_backend_buft_name(lib.ggml_backend_dev_buffer_type(self.handle)).decode()

    def memory(self) -> tuple[int, int]:
        """Returns free and total bytes. It starts CUDA on the device, which then keeps several hundred megabytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _library().ggml_backend_dev_memory(self.handle, ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


def gpus() -> tuple[Gpu, ...]:
    """Returns the CUDA devices in CUDA's order. Loads the plug-in; raises LoadError if that fails."""
    try:
        plugin.load_plugin()
    except PluginError as error:
        raise LoadError("model_load_failed", f"the CUDA plug-in cannot be used: {error}") from error
    lib = _library()
    found: list[Gpu] = []
    for handle in _handles(lib):
        if _is_gpu(lib, handle):
            registry = lib.ggml_backend_dev_backend_reg(handle)
            splits_rows = bool(lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_split_buffer_type"))
            copies_weights = lib.ggml_backend_reg_name(registry) == b"CUDA"
            found.append(Gpu(lib.ggml_backend_dev_name(handle).decode(), handle, splits_rows, copies_weights))
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
                backend="LlamaCppCuda" if _is_gpu(lib, handle) else "LlamaCppCpu",
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


def _is_gpu(lib: ctypes.CDLL, handle: int) -> bool:
    registry = lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(handle)).decode()
    return lib.ggml_backend_dev_type(handle) in (_GPU, _INTEGRATED_GPU) and registry in ("CUDA", "RPC")


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
        ("ggml_backend_reg_name", [handle], text),
        ("ggml_backend_reg_get_proc_address", [handle, text], handle),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib
