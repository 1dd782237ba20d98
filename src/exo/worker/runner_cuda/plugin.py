"""ggml's CUDA back end as a plug-in: its description, which GPUs it has code for, and loading it.

The llama-cpp-python wheel is a build for the CPU. ``exo setup cuda`` puts ``libggml-cuda.so`` and its description into
a folder of the environment. Standard library only, since the setup uses it as well.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from exo.worker.protocol.nvidia_driver import Driver, Version

BINDINGS = "0.3.36"
"""The release of llama-cpp-python whose plug-ins are set up."""
LIBRARY, DESCRIPTION, BASE = "libggml-cuda.so", "plugin.json", "libggml-base.so"
OLDEST_DRIVERS = {12: "525", 13: "580"}
"""The first driver that runs a major release of CUDA."""
REMEDY = "exo setup cuda"
RPC_LIBRARY = "libggml-rpc.so"


class PluginError(Exception):
    """The plug-in cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plug-in's description."""

    source: str
    """Where it is from, such as "package @owner/name 1.0"."""
    bindings: str
    """The release of llama-cpp-python whose ggml it is known to fit."""
    cuda: Version
    """The toolkit that compiled it."""
    machine_code: tuple[str, ...]
    """Architectures, such as "89"; "120a" is for that compute capability alone."""
    ptx: tuple[str, ...]
    """Architectures whose code the driver compiles when it is first used, also for later GPUs."""
    libraries: tuple[str, ...]
    """Folders of libcudart and libcublas; the system's are used where it is in none of them."""

    def needs_ptx(self, driver: Driver) -> bool:
        """Whether a GPU of the driver has no machine code in it."""
        return not all(_has_machine_code(self, each) for each in driver.capabilities)

    def why_not(self, driver: Driver) -> str:
        """Why it cannot serve all GPUs of this driver; empty if it can."""
        has = f"driver {driver.version} supports CUDA {_dotted(driver.cuda)}"
        if driver.cuda[0] < self.cuda[0]:
            oldest = OLDEST_DRIVERS.get(self.cuda[0], "a newer one")
            return f"{has}, and CUDA {self.cuda[0]} needs driver {oldest} or newer"
        for capability in driver.capabilities:
            if _has_machine_code(self, capability):
                continue
            lacks = f"it has no machine code for compute capability {_dotted(capability)}"
            if not any(_parsed(each) <= capability for each in self.ptx):
                return lacks
            if driver.cuda < self.cuda:
                return f"{lacks}; {has}, which does not compile PTX of CUDA {_dotted(self.cuda)}"
        return ""

    def write(self, folder: Path) -> None:
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self), indent=1) + "\n")


def _has_machine_code(plugin: Plugin, capability: Version) -> bool:
    """Machine code runs on its own compute capability and on later ones of the same major number."""
    return any(
        _parsed(each) == capability
        if each.endswith("a")
        else _parsed(each)[0] == capability[0] and _parsed(each) <= capability
        for each in plugin.machine_code
    )


def _parsed(architecture: str) -> Version:
    number = architecture.rstrip("af")
    return int(number[:-1]), int(number[-1])


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def plugin_folder() -> Path:
    """The environment's own: EXO_CUDA_PLUGIN, or ``cuda-plugin`` beside the environment's ``bin``."""
    return Path(os.environ.get("EXO_CUDA_PLUGIN") or Path(sys.prefix) / "cuda-plugin")


def read_plugin(folder: Path) -> Plugin | None:
    """The plug-in in a folder; None where there is none. Raises PluginError for a description that cannot be read."""
    try:
        text = (folder / DESCRIPTION).read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PluginError(f"{folder / DESCRIPTION} cannot be read: {error.strerror}") from error
    try:
        value = json.loads(text)
        lists = {key: tuple(value[key]) for key in ("cuda", "machine_code", "ptx", "libraries")}
        plugin = Plugin(str(value["source"]), str(value["bindings"]), **lists)
        [_parsed(each) for each in (*plugin.machine_code, *plugin.ptx)]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PluginError(f"{folder / DESCRIPTION} is not a plug-in's description: {error!r}") from error
    return plugin


def rpc_servers() -> tuple[str, ...]:
    """EXO_TEST_RPC_SERVERS: addresses of llama.cpp's RPC servers, whose devices take the place of CUDA's in tests."""
    return tuple(filter(None, os.environ.get("EXO_TEST_RPC_SERVERS", "").split(",")))


@cache
def load_plugin() -> None:
    """Adds CUDA's devices, or those of ``rpc_servers``, to those of the loaded ggml. Raises PluginError."""
    from llama_cpp.llama_cpp import _lib as ggml  # pyright: ignore[reportPrivateUsage]

    ggml.ggml_backend_reg_by_name.argtypes, ggml.ggml_backend_reg_by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    if servers := rpc_servers():
        ggml.ggml_backend_register.argtypes, ggml.ggml_backend_register.restype = [ctypes.c_void_p], None
        for each in servers:
            ggml.ggml_backend_register(rpc_function("add_server", ctypes.c_void_p, ctypes.c_char_p)(each.encode()))
        return
    if ggml.ggml_backend_reg_by_name(b"CUDA"):  # a wheel that was built with it
        return
    folder = plugin_folder()
    plugin = read_plugin(folder)
    if plugin is None:
        raise PluginError("there is no CUDA plug-in")
    load_library(folder / LIBRARY, plugin.bindings, needed_libraries(plugin.cuda[0]), plugin.libraries)


def load_library(file: Path, bindings: str, needed: Iterable[str], folders: Sequence[str] = ()) -> None:
    """Adds a back end to the loaded ggml. Raises PluginError.

    These checks precede any code of the plug-in: that it was proved with the installed release of the bindings, that it
    will share the loaded libggml-base, and that everything it links to is found: ``needed`` libraries in ``folders`` or
    else in the system's. ``ggml_backend_load`` compares GGML_BACKEND_API_VERSION.
    """
    import llama_cpp
    from llama_cpp.llama_cpp import _lib as ggml  # pyright: ignore[reportPrivateUsage]

    if bindings != llama_cpp.__version__:
        raise PluginError(f"it is for llama-cpp-python {bindings}, and {llama_cpp.__version__} is installed")
    own, loaded = file.parent / BASE, Path(llama_cpp.__file__).parent / "lib" / f"{BASE}.0"
    if not (own.exists() and own.samefile(loaded)):
        raise PluginError(f"{own} does not lead to {loaded}")
    try:
        for name in needed:
            found = (Path(each) / name for each in folders)
            ctypes.CDLL(str(next((each for each in found if each.exists()), name)), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(file), mode=os.RTLD_NOW)
    except OSError as error:
        raise PluginError(str(error)) from error
    _load(ggml, file)


def has_nccl() -> bool:
    """Whether CUDA's back end is built with NCCL, with which GPUs add up their parts of a layer."""
    import llama_cpp

    places = (plugin_folder() / LIBRARY, Path(llama_cpp.__file__).parent / "lib" / LIBRARY)
    file = next((each for each in places if each.exists()), None)
    if file is None:
        return False
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
        return content.find(b"ncclCommInitAll") >= 0


def _load(ggml: ctypes.CDLL, file: Path) -> int:
    """Returns ggml's handle of the back end. Raises PluginError."""
    ggml.ggml_backend_load.argtypes, ggml.ggml_backend_load.restype = [ctypes.c_char_p], ctypes.c_void_p
    registry = ggml.ggml_backend_load(os.fsencode(file))
    if not registry:
        raise PluginError(f"ggml refuses {file}: it is made for another version of ggml's back end interface")
    return registry


def rpc_function(name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    """Returns ``ggml_backend_rpc_NAME`` of ggml's RPC back end, which it loads. Raises PluginError."""
    from llama_cpp.llama_cpp import _lib as ggml  # pyright: ignore[reportPrivateUsage]

    find = ggml.ggml_backend_reg_get_proc_address
    find.argtypes, find.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
    return ctypes.CFUNCTYPE(result, *arguments)(find(_load_rpc(), f"ggml_backend_rpc_{name}".encode()))


@cache
def _load_rpc() -> int:
    """Returns ggml's handle of the RPC back end. Raises PluginError."""
    import llama_cpp
    from llama_cpp.llama_cpp import _lib as ggml  # pyright: ignore[reportPrivateUsage]

    file = Path(llama_cpp.__file__).parent / "lib" / RPC_LIBRARY
    if not file.exists():
        raise PluginError(f"there is no {file}; make llama builds it")
    return _load(ggml, file)


def needed_libraries(major: int) -> tuple[str, ...]:
    """Libraries that a plug-in of a major release of CUDA links to, in the order of loading."""
    return ("libcuda.so.1", *(f"{name}.so.{major}" for name in ("libcudart", "libcublasLt", "libcublas")))
