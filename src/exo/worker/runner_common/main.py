"""A runner as a program: it serves commands from standard input, or answers ``--probe`` or ``--score`` and ends."""

import gc
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a probe needs none of the protocol
    from exo.worker.protocol.probe import Probe

_USUAL = gc.get_threshold()
_AT_START = 50_000
"""Objects made between two garbage collections until the model is loaded; seventy times Python's own number.

An engine's libraries make up to a million objects that stay. To look through them again and again takes a quarter of
vLLM's start."""


def run(package: str, probe: "Callable[[], Probe]") -> None:
    """Runs the program of a runner's package. Returns only after ``--probe``.

    The package's modules ``runner`` (``front_end``) and ``score`` (``open_reader``) import the engine's library. They
    are imported when the library can no longer print into the protocol stream, and ``runner`` after the server has been
    told that the runner lives. The process ends at once when standard input closes, since no server is left then.
    """
    gc.set_threshold(_AT_START)
    if sys.argv[1:] == ["--probe"]:
        print(probe().model_dump_json())
        return
    from exo.worker.protocol.events import Status
    from exo.worker.protocol.wire import exit_now, read_commands, take_protocol_stream
    from exo.worker.runner_common.output_processor import Emitter

    protocol = take_protocol_stream()
    if sys.argv[1:] == ["--score"]:
        from exo.worker.runner_common.scoring import answer_score

        exit_now(answer_score(protocol, import_module(f"{package}.score").open_reader))
    threading.excepthook = lambda args: die(args.exc_type, args.exc_value, args.exc_traceback)
    sys.excepthook = die
    emitter = Emitter(protocol)
    emitter.start()
    emitter.put(Status(state="Idle"))
    import_module(f"{package}.runner").front_end(emitter).serve(read_commands(sys.stdin.buffer))
    exit_now(0)


def die(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """An exception hook that ends the process; the server handles the pending requests."""
    from exo.worker.protocol.wire import exit_now

    traceback.print_exception(kind, error, trace)
    exit_now(1)


def collect_as_usual() -> None:
    """Has objects collected as Python does, once the model is loaded.

    All objects that exist now are left out: to collect among them would delay each stream by a third of a second.
    """
    gc.freeze()
    gc.set_threshold(*_USUAL)
