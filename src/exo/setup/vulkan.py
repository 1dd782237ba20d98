"""``exo setup vulkan``: puts ggml's Vulkan back end beside the llama.cpp of this environment, as a plug-in."""

import ctypes
import platform
import shutil
from contextlib import suppress

from exo.config import cache_directory
from exo.setup.gpu_plugin import VULKAN, link_plugin, self_test
from exo.setup.npm import fetch_member
from exo.setup.steps import SetupError, digest, finish, finished, say, step
from exo.worker.runner_cuda.plugin import BINDINGS
from exo.worker.runner_cuda.vulkan import LIBRARY, LOADER, VulkanPlugin, installed_vulkan, vulkan_folder

SOURCES = ("auto", "0")
_PACKAGE = "@node-llama-cpp/linux-x64-vulkan@3.22.1"
_SHA512 = (
    "6c1c6a53e24e701bb59dbe508f6cdc31c8be241c93d44f046a31ef62877235f5"
    "483e41215e1fbf1ccc11d7f053ef13f4f182b4864b3e90cf1f825111d0ff0912"
)
"""Its llama.cpp is the one of the CUDA packages, see ``exo.setup.cuda.Prebuilt``."""
_MEMBER = "package/bins/linux-x64-vulkan/libggml-vulkan.so"
_DRIVERS = "on Debian or Ubuntu: apt install libvulkan1 mesa-vulkan-drivers"


def set_up_vulkan(source: str = "auto") -> str:
    """Sets up the plug-in and tries it on each GPU; "0" removes it. Returns the new state. Raises SetupError."""
    if source not in SOURCES:
        raise SetupError(f"--source: expected {' or '.join(SOURCES)} (got {source!r})")
    target = vulkan_folder()
    if source == "0":
        shutil.rmtree(target, ignore_errors=True)
        return "Vulkan is off"
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        found = f"{platform.system()} {platform.machine()}"
        raise SetupError(f"the Vulkan plug-in is for x86-64 Linux, and this is {found}")
    try:
        ctypes.CDLL(LOADER)
    except OSError as error:
        raise SetupError(f"Vulkan is not installed: {error} ({_DRIVERS})") from error
    known = installed_vulkan()
    if known is None or known.bindings != BINDINGS:
        folder = cache_directory() / "vulkan" / f"prebuilt-{digest(_SHA512)}"
        if not finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with step(f"downloading {_PACKAGE} (24 MB)"):
                fetch_member(_PACKAGE, _SHA512, _MEMBER, folder / LIBRARY)
            VulkanPlugin(f"package {_PACKAGE}", BINDINGS).write(folder)
            finish(folder)
        link_plugin(folder, LIBRARY, target)
    with step("trying it on the GPU: a tiny model, compared with the CPU"):
        tested = self_test(VULKAN)
    if tested.failure:
        with suppress(FileNotFoundError):
            shutil.rmtree(target)
        hint = "" if tested.proofs else f"; does the GPU have a Vulkan driver ({_DRIVERS})?"
        raise SetupError(f"{tested.failure}{hint}")
    say(tested.proved)
    return f"the Vulkan plug-in is set up: package {_PACKAGE}"
