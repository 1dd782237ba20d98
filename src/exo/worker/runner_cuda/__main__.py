"""The llama.cpp runner as a program: the contract, or with ``--probe`` or ``--score`` a single answer.

llama.cpp is imported after the protocol's stream is safe from what libraries print, and not at all where a probe finds
that it is missing.
"""

import os
import sys
import threading
import traceback
from types import TracebackType

from exo.worker.protocol.messages import Status
from exo.worker.protocol.wire import exit_now, read_commands, take_protocol_stream
from exo.worker.runner_common.output_processor import Emitter
from exo.worker.runner_cuda.loading.devices import probe
from exo.worker.runner_cuda.loading.huge_pages import restart_with_huge_pages

SPIN_COUNT = "1000"
"""How often a thread of llama.cpp's looks whether the others are done before it sleeps (GCC's OpenMP). This takes some
microseconds. A thread that spins for longer occupies the core that the thread it waits for needs: next to another busy
process, a step then takes up to fifty times as long."""
SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from the one that has just finished a decode; Python's own 5 ms is a tenth
of a step."""


def _die(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """A thread that fails takes the process with it; the server then deals with what was in flight."""
    traceback.print_exception(kind, error, trace)
    exit_now(1)


def main() -> None:
    """Serves standard input until it closes: then nobody is left to serve, so the process ends at once."""
    # A debugger that ggml starts at a failed assertion takes seconds and buries the assertion under its backtrace.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    if sys.argv[1:] == ["--probe"]:
        print(probe().model_dump_json())
        return
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # before the library that reads it is loaded
    restart_with_huge_pages()
    protocol = take_protocol_stream()
    if sys.argv[1:] == ["--score"]:
        from exo.worker.runner_cuda import score

        exit_now(score.main(protocol))
    threading.excepthook = lambda args: _die(args.exc_type, args.exc_value, args.exc_traceback)
    sys.excepthook = _die
    sys.setswitchinterval(SWITCH_SECONDS)
    emitter = Emitter(protocol)
    emitter.start()
    emitter.put(Status(state="Idle"))
    from exo.worker.runner_cuda.runner import Runner

    runner = Runner(emitter)
    for command in read_commands(sys.stdin.buffer):
        runner.take(command)
    exit_now(0)


if __name__ == "__main__":
    main()
