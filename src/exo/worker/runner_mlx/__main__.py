"""The MLX runner as a program: ``python -m exo.worker.runner_mlx`` (the contract), ``… --probe`` or ``… --score``.

MLX is imported after the protocol's stream is safe from what libraries print, and not at all where a probe finds that
it is missing.
"""

import sys
import threading
import traceback
from types import TracebackType

from exo.worker.protocol.messages import Status
from exo.worker.protocol.wire import exit_now, read_commands, take_protocol_stream
from exo.worker.runner_common.output_processor import Emitter
from exo.worker.runner_mlx.probe import probe


def _die(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """A thread that fails takes the process with it; the server then deals with what was in flight."""
    traceback.print_exception(kind, error, trace)
    exit_now(1)


def main() -> None:
    """Serves standard input until it closes: then nobody is left to serve, so the process ends at once."""
    if sys.argv[1:] == ["--probe"]:
        print(probe().model_dump_json())
        return
    protocol = take_protocol_stream()
    if sys.argv[1:] == ["--score"]:
        from exo.worker.runner_mlx import score

        exit_now(score.main(protocol))
    threading.excepthook = lambda args: _die(args.exc_type, args.exc_value, args.exc_traceback)
    sys.excepthook = _die
    emitter = Emitter(protocol)
    emitter.start()
    emitter.put(Status(state="Idle"))
    from exo.worker.runner_mlx.runner import Runner

    runner = Runner(emitter)
    for command in read_commands(sys.stdin.buffer):
        runner.take(command)
    exit_now(0)


if __name__ == "__main__":
    main()
