"""``exo setup cuda``: puts ggml's CUDA back end beside the llama.cpp of this environment, as a plug-in.

In this order: a plug-in in the cache, a prebuilt one, a build with the CUDA toolkit of this machine, a build with one
from PyPI. Each has to pass a self-test on the GPU; the next one is tried if it does not.
"""

import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from exo.config import cache_directory
from exo.setup.gpu_plugin import CUDA, link_plugin, self_test
from exo.setup.npm import fetch_member
from exo.setup.steps import SetupError, digest, finish, finished, install_wheels, say, step
from exo.setup.toolkit import (
    RUNTIME_WHEELS,
    WHEELS_VERSION,
    Toolkit,
    build_plugin,
    own_toolkit,
    parse_architectures,
    toolkit_from_wheels,
)
from exo.worker.protocol.nvidia_driver import Driver, DriverError, driver
from exo.worker.runner_cuda.plugin import BASE, BINDINGS, LIBRARY, Plugin, PluginError, plugin_folder
from exo.worker.runner_cuda.plugin import read_plugin as read

SOURCES = ("auto", "prebuilt", "build", "0")
_NO_DRIVER = Driver("", (99, 0), ())
"""Stands for the driver of the machine that a plug-in is made for on one without a driver."""


@dataclass(frozen=True, slots=True)
class Prebuilt:
    """A package of the npm registry that has a CUDA back end of a ggml with the same headers as the bindings'.

    ggml.h, ggml-backend.h, ggml-backend-impl.h, ggml-impl.h, ggml-common.h and ggml-cuda.h of its llama.cpp 0.5.0 were
    found to be byte for byte those of the bindings' release, so structures and functions agree.
    """

    package: str
    sha512: str
    member: str
    size: str
    plugin: Plugin
    runtime: tuple[str, ...]
    runtime_size: str


PREBUILT = (
    Prebuilt(
        "@node-llama-cpp/linux-x64-cuda@3.22.1",
        "f2b4028f234d2d9254162b7e6298f0942e21c242a038c224076c2ec9c2817fc3"
        "54d8edf248a6e259943c6b0f64bb69d44d78d29d422b13a281f3c8ad76e4c1b8",
        "package/bins/linux-x64-cuda/libggml-cuda.so",
        "143 MB",
        Plugin("", BINDINGS, (13, 1), ("86", "89", "120a", "121a"), ("75", "80", "90"), ()),
        RUNTIME_WHEELS,
        "407 MB",
    ),
    Prebuilt(
        "@node-llama-cpp/linux-x64-cuda-ext@3.22.1",
        "e1ee5a8e488cd9a476580741fcdfc00a4e30784847bce008af3c593ec217d310"
        "c55b9fba8614a1bb2d7fbecf3c48af4d19d800728f48c84dbc7984b41f579fa4",
        "package/bins/linux-x64-cuda/fallback/libggml-cuda.so",
        "177 MB",
        Plugin("", BINDINGS, (12, 4), ("86",), ("50", "61", "70", "75", "80"), ()),
        ("nvidia-cuda-runtime-cu12==12.4.127", "nvidia-cublas-cu12==12.4.5.8"),
        "364 MB",
    ),
)


def set_up_cuda(source: str = "auto", architectures: str = "") -> str:
    """Sets up the plug-in; "0" removes it. Returns a sentence on the new state. Raises SetupError.

    ``architectures`` are CMake's, such as "89-real;90-real". A machine without a driver needs them to compile. With
    "prebuilt", it gets the package of the newest CUDA untried, as for a container image.
    """
    if source not in SOURCES:
        raise SetupError(f"--source: expected {', '.join(SOURCES)} (got {source!r})")
    if source == "0":
        shutil.rmtree(plugin_folder(), ignore_errors=True)
        return "CUDA is off; llama.cpp computes on the CPU"
    try:
        present = driver()
    except DriverError as error:
        raise SetupError(str(error)) from error
    if present is None or not present.capabilities:
        what = "there is no NVIDIA driver" if present is None else "the NVIDIA driver lists no GPU"
        if not architectures and source != "prebuilt":
            raise SetupError(f"{what} on this machine")
        present, source = _NO_DRIVER, "prebuilt" if source == "prebuilt" else "build"
    wanted = parse_architectures(architectures) if architectures else None

    def suits(plugin: Plugin) -> bool:
        kind = plugin.source.startswith("built") == (source == "build") or source == "auto"
        as_wanted = wanted is None or wanted == (plugin.machine_code, plugin.ptx)
        return kind and as_wanted and plugin.bindings == BINDINGS and not plugin.why_not(present)

    installed = installed_plugin()
    if installed is not None and suits(installed):
        return f"the CUDA plug-in is set up: {installed.source}"
    if present.version:
        gpus = ", ".join(sorted({f"{major}.{minor}" for major, minor in present.capabilities}))
        say("driver {} for CUDA {}.{}; compute capability {}".format(present.version, *present.cuda, gpus))
    refusals: list[str] = []
    for name, produce in (*_cached(suits, present), *_sources(source, present, architectures)):
        try:
            folder = produce()
            return f"the CUDA plug-in is set up: {_install(folder, present)}"
        except SetupError as error:
            say(f"{name}: {error}")
            refusals.append(f"{name}: {error}")
    raise SetupError(f"no CUDA plug-in could be set up. {'; '.join(refusals)}{_ways_out(present)}")


def _ways_out(present: Driver) -> str:
    if present.cuda >= (13, 0):
        return ""
    has = "{} supports CUDA up to {}.{}".format(present.version, *present.cuda)
    return (
        f". The driver {has}: either update it to 580 or newer, or install a CUDA toolkit of that release and run"
        " `exo setup cuda --source build`"
    )


def installed_plugin() -> Plugin | None:
    """The plug-in of this environment; None where it is missing, or its files are gone."""
    folder = plugin_folder()
    try:
        plugin = read(folder)
    except PluginError:
        return None
    return plugin if plugin and (folder / LIBRARY).exists() and (folder / BASE).exists() else None


_Producer = tuple[str, Callable[[], Path]]


def _cached(suits: Callable[[Plugin], bool], present: Driver) -> list[_Producer]:
    """Those with machine code for all GPUs; the others wait until it is their turn among the sources."""
    found: list[tuple[Plugin, Path]] = []
    for folder in filter(finished, _cache().glob("plugins/*")):
        with suppress(PluginError):
            plugin = read(folder)
            if plugin is not None and suits(plugin) and not plugin.needs_ptx(present):
                found.append((plugin, folder))
    found.sort(key=lambda each: each[0].cuda, reverse=True)
    return [(f"plug-in in the cache ({plugin.source})", lambda folder=folder: folder) for plugin, folder in found]


def _sources(source: str, present: Driver, architectures: str) -> list[_Producer]:
    """Prebuilt ones with machine code for all GPUs come before those that the driver has to compile."""
    wanted = architectures or ";".join(f"{major}{minor}-real" for major, minor in sorted({*present.capabilities}))
    packages = sorted(PREBUILT, key=lambda each: each.plugin.needs_ptx(present))
    prebuilt = [(f"package {each.package}", lambda each=each: _prebuilt(each, present)) for each in packages]
    builds: list[_Producer] = [
        ("build with this machine's toolkit", lambda: _built(own_toolkit, present, wanted)),
        ("build with a toolkit from packages", lambda: _built_from_wheels(present, wanted)),
    ]
    if source == "prebuilt":
        return prebuilt
    return builds if source == "build" or architectures else [*prebuilt, *builds]


def _prebuilt(package: Prebuilt, present: Driver) -> Path:
    """Fetches a package and the CUDA libraries that it needs. Raises SetupError."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise SetupError(f"it is for x86-64 Linux, and this is {platform.system()} {platform.machine()}")
    if why := package.plugin.why_not(present):
        raise SetupError(why)
    folder = _cache() / "plugins" / f"prebuilt-{digest(package.sha512, *package.runtime)}"
    if finished(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with step(f"downloading {package.package} ({package.size})"):
        fetch_member(package.package, package.sha512, package.member, folder / LIBRARY)
    runtime = _cache() / f"runtime-{package.plugin.cuda[0]}-{digest(*package.runtime)}"
    if not finished(runtime):
        with step(f"installing cuBLAS and the CUDA run time (download of {package.runtime_size})"):
            install_wheels(package.runtime, runtime)
        finish(runtime)
    libraries = dict.fromkeys(str(each.parent) for each in sorted(runtime.glob("**/lib/libcu*.so.*")))
    replace(package.plugin, source=f"package {package.package}", libraries=tuple(libraries)).write(folder)
    finish(folder)
    return folder


def compiled_plugin(architectures: str) -> Path:
    """A plug-in for another machine, from the cache or compiled with the toolkit from packages. Raises SetupError."""
    return _built_from_wheels(_NO_DRIVER, architectures)


def _built_from_wheels(present: Driver, architectures: str) -> Path:
    if present.cuda[0] < WHEELS_VERSION[0]:
        has = f"{WHEELS_VERSION[0]}, which driver {present.version} does not run"
        raise SetupError(f"it is CUDA {has}; PyPI has no compiler of CUDA 12")
    if unsupported := [each for each in present.capabilities if each < (7, 5)]:
        raise SetupError("CUDA 13 has no code for compute capability {}.{}".format(*unsupported[0]))
    return _built(lambda: toolkit_from_wheels(_cache()), present, architectures)


def _built(find: Callable[[], Toolkit], present: Driver, architectures: str) -> Path:
    """Raises SetupError."""
    toolkit = find()
    if toolkit.version[0] > present.cuda[0]:
        raise SetupError("nvcc is CUDA {}.{}, which driver {} does not run".format(*toolkit.version, present.version))
    key = digest(BINDINGS, *map(str, toolkit.version), str(toolkit.root), architectures)
    folder = _cache() / "plugins" / f"built-{key}"
    if not finished(folder):
        build_plugin(toolkit, architectures, _cache(), folder)
        finish(folder)
    return folder


def _install(folder: Path, present: Driver) -> str:
    """Links a plug-in into the environment and tries it; returns its source. Raises SetupError if it does not work."""
    target = plugin_folder()
    link_plugin(folder, LIBRARY, target)
    plugin = read(target)
    assert plugin is not None
    if present.capabilities:
        with step("trying it on the GPU: a tiny model, compared with the CPU"):
            tested = self_test(CUDA)
        if tested.broken:
            shutil.rmtree(target)
            raise SetupError(tested.failure)
        say(tested.failure or tested.proved)
    return plugin.source


def _cache() -> Path:
    return cache_directory() / "cuda"
