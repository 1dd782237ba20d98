"""Stand-ins for NVIDIA's driver and for the CUDA plug-in, compiled from C: the loader takes them for the real ones."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from exo.worker.runner_cuda.plugin import LIBRARY, Plugin, needed_libraries

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the stand-in for the driver")

_NVML = """
#include <string.h>
int nvmlInit_v2(void) {{ return {status}; }}
int nvmlInitWithFlags(unsigned flags) {{ return {status}; }}
int nvmlShutdown(void) {{ return 0; }}
const char *nvmlErrorString(int status) {{ return "{error}"; }}
int nvmlSystemGetDriverVersion(char *text, unsigned size) {{ strncpy(text, "{version}", size); return 0; }}
int nvmlSystemGetCudaDriverVersion_v2(int *cuda) {{ *cuda = {cuda}; return 0; }}
int nvmlDeviceGetCount_v2(unsigned *count) {{ *count = 1; return 0; }}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {{ *handle = (void *)1; return 0; }}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor)
{{ *major = {capability[0]}; *minor = {capability[1]}; return 0; }}
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {{ strncpy(text, "Stand-in", size); return 0; }}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory)
{{ memory[0] = 8ull << 30; memory[1] = 7ull << 30; memory[2] = 1ull << 30; return 0; }}
int nvmlDeviceGetPciInfo_v3(void *handle, char *info) {{ memset(info, 0, 68); info[20] = 0x41; return 0; }}
int nvmlDeviceGetCurrPcieLinkWidth(void *handle, unsigned *lanes) {{ *lanes = 4; return 0; }}
int nvmlDeviceGetMaxPcieLinkWidth(void *handle, unsigned *lanes) {{ *lanes = 16; return 0; }}
"""
_CUDA_FUNCTIONS = (
    "cuDeviceGet", "cuDeviceGetAttribute", "cuGetErrorString", "cuMemAddressFree", "cuMemAddressReserve", "cuMemCreate",
    "cuMemGetAllocationGranularity", "cuMemMap", "cuMemRelease", "cuMemSetAccess", "cuMemUnmap",
)  # fmt: skip
NO_DEVICE = "".join(f"int {name}(void) {{ return 100; }}\n" for name in _CUDA_FUNCTIONS)
"""A libcuda that has no device."""
CRASHES = """
#include <stdlib.h>
void *ggml_backend_init(void) { abort(); }
"""
OLD_INTERFACE = """
struct { int version; void *others[8]; } registry = { 1 };
void *ggml_backend_init(void) { return &registry; }
"""
FITTING = Plugin("stand-in", "0.3.36", (13, 1), ("86", "89"), ("75",), ())


@dataclass(frozen=True, slots=True)
class StandIn:
    """What a stand-in for the driver says; ``status`` is NVML's, of its initialisation."""

    version: str = "580.95.05"
    cuda: int = 13000
    capability: tuple[int, int] = (8, 9)
    status: int = 0
    error: str = ""


def compiled(folder: Path, name: str, source: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)


def install_driver(folder: Path, driver: StandIn | None) -> Mapping[str, str]:
    """The environment of a process that sees this driver, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    if driver is not None:
        fields = {each: getattr(driver, each) for each in StandIn.__dataclass_fields__}
        compiled(folder, "libnvidia-ml.so.1", _NVML.format(**fields))
        compiled(folder, "libcuda.so.1", NO_DEVICE)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def install_plugin(folder: Path, source: str, plugin: Plugin = FITTING) -> Mapping[str, str]:
    """A plug-in of this C source beside libraries of CUDA that hold nothing; the variable that names its folder."""
    import llama_cpp

    for name in needed_libraries(plugin.cuda[0])[1:]:
        compiled(folder, name, "")
    compiled(folder, LIBRARY, source)
    (folder / "libggml-base.so").symlink_to(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so.0")
    Plugin(plugin.source, plugin.bindings, plugin.cuda, plugin.machine_code, plugin.ptx, (str(folder),)).write(folder)
    return {"EXO_CUDA_PLUGIN": str(folder)}


def exo(*arguments: str, env: Mapping[str, str], python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-m", "exo", *arguments], env=env, capture_output=True, text=True, check=False)
