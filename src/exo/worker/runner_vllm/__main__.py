"""The vLLM runner as a program: ``python -m exo.worker.runner_vllm``, or with ``--probe`` or ``--score``.
``--follow ADDRESS`` computes a share of a model whose runner is on another host.

It runs in an environment of its own, which has neither the server's packages nor the other engines. ``--probe --try``
also imports vLLM, which takes ten seconds, and exits with status 1 if that fails.
"""

import sys

from exo.worker.runner_common.main import run
from exo.worker.runner_vllm.probe import probe, try_engine
from exo.worker.runner_vllm.switches import set_defaults


def main() -> None:
    """Runs the program. It sets environment variables here, so importing the runner sets none."""
    set_defaults()
    if sys.argv[1:] == ["--probe", "--try"]:
        from exo.worker.protocol.wire import encode, exit_now, take_protocol_stream

        protocol = take_protocol_stream()
        found = try_engine(probe())
        protocol.write(encode(found))
        exit_now(0 if found.installed else 1)
    if sys.argv[1:2] == ["--follow"]:
        from exo.worker.runner_vllm import follower

        follower.main(sys.argv[2])
    run("exo.worker.runner_vllm", probe)


# vLLM starts further processes by importing this file again if a model is spread over several devices.
if __name__ == "__main__":
    main()
