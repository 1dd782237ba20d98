"""CUDA compilers: the user's own, or one made of NVIDIA's packages on PyPI; and the build of the plug-in with one."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exo.setup.steps import SetupError, finish, finished, install_wheels, pip_command, run, run_build, step
from exo.worker.protocol.nvidia_driver import Version
from exo.worker.runner_cuda.plugin import BINDINGS, LIBRARY, Plugin

WHEELS_VERSION: Version = (13, 2)
RUNTIME_WHEELS = ("nvidia-cuda-runtime==13.2.86", "nvidia-cublas==13.4.1.1")
COMPILER_WHEELS = tuple(
    f"{name}==13.2.86" for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl")
)
"""There is no such set for CUDA 12, whose package of nvcc has no nvcc."""
CPU_MINUTES = 40
"""The CPU time of compiling for one architecture."""
_COMPILER_BYTES = 3 << 30
"""The memory that one nvcc process may take."""
_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")

_CHECK = """
#include <cublas_v2.h>
__global__ void kernel() {}
int main() { kernel<<<1, 1>>>(); cublasHandle_t handle; return cublasCreate(&handle); }
"""
_DRIVER_FUNCTIONS = (
    "cuDeviceGet", "cuDeviceGetAttribute", "cuGetErrorString", "cuMemAddressFree", "cuMemAddressReserve", "cuMemCreate",
    "cuMemGetAllocationGranularity", "cuMemMap", "cuMemRelease", "cuMemSetAccess", "cuMemUnmap",
)  # fmt: skip
"""The driver functions that llama.cpp calls. The linker gets them from a stub: the machine may have no driver."""
_SWITCHES = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_CUDA=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU=OFF", "-DGGML_CUDA_NCCL=OFF",
    "-DGGML_CCACHE=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "EXAMPLES", "TOOLS", "SERVER", "APP", "UI")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Toolkit:
    """A compiler that has compiled and linked a program with cuBLAS."""

    nvcc: Path
    root: Path
    version: Version

    def libraries(self) -> tuple[str, ...]:
        """Folders of its shared libraries."""
        folders = (self.root / each for each in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"))
        return tuple(str(each) for each in folders if each.is_dir())


def own_toolkit() -> Toolkit:
    """The toolkit that is installed on this machine. Raises SetupError naming what it lacks."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("nvcc", path=os.pathsep.join(_PLACES))
    if nvcc is None:
        raise SetupError(f"there is no nvcc in PATH, {' or '.join(_PLACES)}")
    return _checked(Path(nvcc))


def toolkit_from_wheels(cache: Path) -> Toolkit:
    """A toolkit in the cache, made of packages from PyPI. Raises SetupError."""
    folder = cache / "toolkit-{}.{}".format(*WHEELS_VERSION)
    if not finished(folder):
        with step("installing the CUDA toolkit from packages (download of 520 MB, 0.9 GB on disk)"):
            install_wheels((*RUNTIME_WHEELS, *COMPILER_WHEELS), folder)
        root = _wheels_root(folder)
        for name in ("libcudart", "libcublas", "libcublasLt"):  # the linker looks for names without a version
            link = root / "lib" / f"{name}.so"
            link.unlink(missing_ok=True)
            link.symlink_to(f"{name}.so.{WHEELS_VERSION[0]}")
        if not (root / "lib64").exists():
            (root / "lib64").symlink_to("lib")
        finish(folder)
    return _checked(_wheels_root(folder) / "bin" / "nvcc")


def _wheels_root(folder: Path) -> Path:
    root = next(folder.glob("**/nvidia/cu13"), None)
    if root is None:
        raise SetupError(f"the CUDA packages put nothing into {folder}/**/nvidia/cu13")
    return root


def _checked(nvcc: Path) -> Toolkit:
    """Compiles and links a small program: nvcc, its own parts, cuBLAS and a C++ compiler that it accepts."""
    version = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    top = re.search(r"#\$ TOP=(.+)", _output([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"]))
    if version is None or top is None:
        raise SetupError(f"{nvcc} does not tell its release or its folder")
    root = (nvcc.parent / top[1].strip()).resolve()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cu"
        source.write_text(_CHECK)
        _output([nvcc, source, "-o", Path(folder) / "check", "-lcublas"])
    return Toolkit(nvcc, root, (int(version[1]), int(version[2])))


def _output(command: Sequence[str | Path]) -> str:
    """Returns the output of a program. If it fails, raises SetupError with the first line that mentions an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"{command[0]} does not run: {error}") from error
    output = done.stdout + done.stderr
    if done.returncode:
        lines = [line for line in output.splitlines() if "error" in line.lower() or "cannot find" in line]
        raise SetupError(f"{command[0]} cannot be used: {(lines or [output.strip()])[0][:300]}")
    return output


def build_plugin(toolkit: Toolkit, architectures: str, cache: Path, folder: Path) -> None:
    """Compiles llama.cpp's CUDA back end into ``folder``. A build that was interrupted goes on. Raises SetupError.

    ``architectures`` are CMake's, such as "89-real;90-real".
    """
    machine_code, ptx = parse_architectures(architectures)
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise SetupError("there is no cmake in PATH (on Debian or Ubuntu: apt install cmake)")
    jobs = max(
        1,
        min(len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _COMPILER_BYTES),
    )
    minutes = CPU_MINUTES * len({*machine_code, *ptx}) / jobs
    objects, log = folder / "build", folder / "build.log"
    objects.mkdir(parents=True, exist_ok=True)
    source = llama_source(cache)
    stub = _driver_stub(objects)
    arguments = [*_SWITCHES, f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}", f"-DCUDAToolkit_ROOT={toolkit.root}"]
    arguments += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", f"-DCUDA_cuda_driver_LIBRARY={stub}"]
    if shutil.which("ninja"):
        arguments += ["-G", "Ninja"]
    with step(f"building the CUDA plug-in for {architectures} (about {minutes:.0f} min with {jobs} jobs); log: {log}"):
        run_build([cmake, "-S", source, "-B", objects, *arguments], log, {})
        run_build([cmake, "--build", objects, "--target", "ggml-cuda", "--parallel", str(jobs)], log, {})
    shutil.copy(next(objects.glob(f"**/{LIBRARY}")), folder / LIBRARY)
    source_name = "built with CUDA {}.{} of {}".format(*toolkit.version, toolkit.root)
    Plugin(source_name, BINDINGS, toolkit.version, machine_code, ptx, toolkit.libraries()).write(folder)
    shutil.rmtree(objects)


def parse_architectures(architectures: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Machine code and PTX of CMake's list. Raises SetupError for a name such as "native"."""
    machine_code, ptx = list[str](), list[str]()
    for each in architectures.split(";"):
        match = re.fullmatch(r"(\d{2,3}[af]?)(-real|-virtual)?", each.strip())
        if match is None:
            raise SetupError(f"CUDA_ARCHS: expected architectures such as 89-real;90-real (got {architectures!r})")
        # llama.cpp compiles for the features of exactly these, which later ones need not have.
        name = f"{match[1]}a" if re.fullmatch(r"12\d", match[1]) else match[1]
        if match[2] != "-virtual":
            machine_code.append(name)
        if match[2] != "-real":
            ptx.append(name)
    return tuple(machine_code), tuple(ptx)


def llama_source(cache: Path) -> Path:
    """llama.cpp as the bindings' own source package has it. Raises SetupError."""
    folder = cache / f"source-{BINDINGS}"
    inside = f"llama_cpp_python-{BINDINGS}/vendor/llama.cpp"
    if not finished(folder):
        with step("fetching the source of llama.cpp (download of 70 MB)"), tempfile.TemporaryDirectory() as target:
            name = "llama-cpp-python"
            options = ("-q", "--no-deps", "--no-binary", name, "-d", target)
            run([*pip_command(), "download", *options, f"{name}=={BINDINGS}"])
            with tarfile.open(next(Path(target).glob("*.tar.gz"))) as archive:
                members = [each for each in archive if each.name.startswith(f"{inside}/")]
                archive.extractall(folder, members, filter="data")
        finish(folder)
    return folder / inside


def _driver_stub(folder: Path) -> Path:
    """A libcuda to link with, which is not used when the plug-in runs. Raises SetupError."""
    source, library = folder / "libcuda.c", folder / "libcuda.so"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in _DRIVER_FUNCTIONS))
    compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
    _output([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source])
    return library
