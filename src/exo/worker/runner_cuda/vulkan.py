"""ggml's Vulkan back end as a plug-in, for GPUs of AMD and Intel, and for NVIDIA's where CUDA is not set up.

``exo setup vulkan`` puts ``libggml-vulkan.so`` and its description into a folder of the environment. Standard library
only, since the setup uses it as well.
"""

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from exo.worker.runner_cuda.plugin import DESCRIPTION, PluginError, load_library

LIBRARY = "libggml-vulkan.so"
LOADER = "libvulkan.so.1"
"""Vulkan's own library, which finds the drivers."""
REMEDY = "exo setup vulkan"
_VENDORS = {"0x1002": "AMD", "0x8086": "Intel", "0x10de": "NVIDIA"}
_RENDER_NODES = Path("/sys/class/drm")


def vulkan_folder() -> Path:
    """The environment's own: EXO_VULKAN_PLUGIN, or ``vulkan-plugin`` beside the environment's ``bin``."""
    return Path(os.environ.get("EXO_VULKAN_PLUGIN") or Path(sys.prefix) / "vulkan-plugin")


@dataclass(frozen=True, slots=True)
class VulkanPlugin:
    """A plug-in's description."""

    source: str
    """Where it is from, such as "package @owner/name 1.0"."""
    bindings: str
    """The release of llama-cpp-python whose ggml it is known to fit."""

    def write(self, folder: Path) -> None:
        (folder / DESCRIPTION).write_text(json.dumps(asdict(self)) + "\n")


def installed_vulkan() -> VulkanPlugin | None:
    """The plug-in of this environment; None if it is missing or has no readable description."""
    folder = vulkan_folder()
    if not (folder / LIBRARY).exists():
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads((folder / DESCRIPTION).read_text())
        return VulkanPlugin(str(value["source"]), str(value["bindings"]))
    return None


@cache
def load_vulkan() -> None:
    """Adds Vulkan's devices to those of the loaded ggml. Raises PluginError."""
    known = installed_vulkan()
    if known is None:
        raise PluginError("there is no Vulkan plug-in")
    load_library(vulkan_folder() / LIBRARY, known.bindings, (LOADER,))


def vendors_of_gpus() -> tuple[str, ...]:
    """The makers of this machine's GPUs, by the kernel's account."""
    found: dict[str, None] = {}
    for file in sorted(_RENDER_NODES.glob("renderD*/device/vendor")):
        with suppress(OSError):
            found[_VENDORS.get(file.read_text().strip(), "another maker")] = None
    return tuple(found)
