"""The vLLM runner as a program: ``python -m exo.worker.runner_vllm`` (the contract), ``… --probe`` or ``… --score``.

It runs in an environment of its own, where neither the server's packages nor the other engines are. vLLM is imported
after the protocol's stream is safe from what libraries print, and by a probe only with ``--try``: it takes ten seconds.
"""

import sys
import threading
import traceback
from types import TracebackType

from exo.worker.protocol.messages import Status
from exo.worker.protocol.wire import encode, exit_now, read_commands, take_protocol_stream
from exo.worker.runner_common.output_processor import Emitter
from exo.worker.runner_vllm.probe import probe, try_engine


def _die(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """A thread that fails takes the process with it; the server then deals with what was in flight."""
    traceback.print_exception(kind, error, trace)
    exit_now(1)


def main() -> None:
    """Serves standard input until it closes: then nobody is left to serve, so the process ends at once."""
    protocol = take_protocol_stream()
    if sys.argv[1:2] == ["--probe"]:
        found = try_engine(probe()) if "--try" in sys.argv else probe()
        protocol.write(encode(found))
        exit_now(0 if found.installed else 1)
    if sys.argv[1:] == ["--score"]:
        from exo.worker.runner_vllm import score

        exit_now(score.main(protocol))
    threading.excepthook = lambda args: _die(args.exc_type, args.exc_value, args.exc_traceback)
    sys.excepthook = _die
    emitter = Emitter(protocol)
    emitter.start()
    emitter.put(Status(state="Idle"))
    from exo.worker.runner_vllm.runner import Runner

    runner = Runner(emitter)
    for command in read_commands(sys.stdin.buffer):
        runner.take(command)
    exit_now(0)


# vLLM starts further processes by importing this file again where a model is spread over several devices.
if __name__ == "__main__":
    main()
