"""llama.cpp's log, and what it says of a load."""

import ctypes
import re
import sys
from typing import ClassVar

import llama_cpp

from exo.worker.protocol.events import RAM
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_cuda.loading.options import CPU


class Log:
    """Receives llama.cpp's log. Warnings and errors go to standard error; the last errors are kept for diagnosis.

    It also keeps llama.cpp's account of the places of a model's layers, of the last model that was loaded.
    """

    DEBUG, WARNING, ERROR = 1, 3, 4
    _LAYER = re.compile(rb"load_tensors: layer +(\d+) assigned to device (\S+),")
    _IN_RAM = re.compile(rb"tensor blk\.(\d+)\.\S+ \(.*\) buffer type overridden to ")
    # llama.cpp keeps the function's address until the process ends, so the function must never be collected.
    _callbacks: ClassVar[list[object]] = []

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._places: dict[int, str] = {}
        self._overridden: set[int] = set()
        self.callback = llama_cpp.llama_log_callback(self._receive)
        self._callbacks.append(self.callback)
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    @property
    def layers(self) -> dict[str, int]:
        """The number of layers in each place, as in ``Layout.layers``."""
        places = [RAM if name == CPU else name for name in self._places.values()]
        return {name: places.count(name) for name in dict.fromkeys(places)}

    @property
    def experts_in_ram(self) -> int:
        """The number of layers on a device with tensors that ``cpu_moe`` keeps in RAM."""
        return sum(self._places[layer] != CPU for layer in self._overridden)

    def _receive(self, level: int, text: bytes, _: object) -> None:
        if level == self.DEBUG and (found := self._LAYER.match(text)):
            layer = int(found[1])
            if layer == 0:
                self._places, self._overridden = {}, set()
            self._places[layer] = found[2].decode()
        elif level == self.DEBUG and (found := self._IN_RAM.match(text)):
            self._overridden.add(int(found[1]))
        if level not in (self.WARNING, self.ERROR):
            return
        line = text.decode(errors="replace").strip()
        sys.stderr.write(line + "\n")
        if level == self.ERROR:
            self.errors = [*self.errors[-9:], line]


def load_failure(what: str, log: Log) -> LoadError:
    """Returns the error of a load that llama.cpp gave up, with the last lines of its log."""
    detail = "; ".join(log.errors[-3:]) or "it gave no reason"
    low = detail.lower()
    if "out of memory" in low or "failed to allocate" in low or "unable to allocate" in low:
        return LoadError("out_of_memory", f"{what}: not enough memory ({detail})")
    return LoadError("model_load_failed", f"{what}: {detail}")
