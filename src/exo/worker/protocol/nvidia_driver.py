"""Asks NVIDIA's driver for its version, the CUDA that it can run, and the GPUs' compute capabilities.

Asks NVML through ctypes, so it works before any package is installed, and without nvidia-smi.
"""

import ctypes
from dataclasses import dataclass

LIBRARY = "libnvidia-ml.so.1"
Version = tuple[int, int]


class DriverError(Exception):
    """There is a driver and it does not answer; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver that answers."""

    version: str
    """Such as "580.95.05"."""
    cuda: Version
    """The newest CUDA release that it supports, such as (13, 0)."""
    capabilities: tuple[Version, ...]
    """Compute capability of each GPU, such as (9, 0), in the driver's order."""


def driver() -> Driver | None:
    """The driver of this machine; None where its management library is not installed. Raises DriverError."""
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError as error:
        if "cannot open shared object file" in str(error) and LIBRARY in str(error):
            return None
        raise DriverError(f"the NVIDIA driver's {LIBRARY} does not load: {error}") from error
    try:
        _check(nvml, nvml.nvmlInit_v2())
        try:
            return _read(nvml)
        finally:
            nvml.nvmlShutdown()
    except AttributeError as error:
        raise DriverError(f"the NVIDIA driver's {LIBRARY} is too old or not whole: {error}") from error


def _read(nvml: ctypes.CDLL) -> Driver:
    text, cuda, count = ctypes.create_string_buffer(80), ctypes.c_int(), ctypes.c_uint()
    _check(nvml, nvml.nvmlSystemGetDriverVersion(text, len(text)))
    _check(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)))
    _check(nvml, nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    capabilities: list[Version] = []
    for index in range(count.value):
        handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            continue  # a GPU that this user may not open, or that has fallen off the bus
        _check(nvml, nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)))
        capabilities.append((major.value, minor.value))
    major, rest = divmod(cuda.value, 1000)
    return Driver(text.value.decode(errors="replace"), (major, rest // 10), tuple(capabilities))


_REMEDIES = {
    4: "this user may not open the devices /dev/nvidia*",
    9: "the kernel module is not loaded; try `modprobe nvidia`, or reboot after an installation",
    18: "kernel module and libraries are of different versions; reboot after an update of the driver",
}


def _check(nvml: ctypes.CDLL, status: int) -> None:
    if status == 0:
        return
    try:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        text = (nvml.nvmlErrorString(status) or b"").decode(errors="replace")
    except AttributeError:
        text = ""
    why = "; ".join(filter(None, (text or f"NVML status {status}", _REMEDIES.get(status, ""))))
    raise DriverError(f"the NVIDIA driver does not answer: {why}")
