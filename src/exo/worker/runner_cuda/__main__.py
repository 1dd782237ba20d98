"""The llama.cpp runner as a program: ``python -m exo.worker.runner_cuda``.

``--probe``, ``--probe-plugin BACKEND``, ``--self-test BACKEND`` and ``--score`` make it answer once and end.
``--rpc-server ADDRESS`` lends devices to a runner on another host.
"""

import os
import sys

from exo.worker.runner_cuda.loading.huge_pages import restart_with_huge_pages

SPIN_COUNT = "1000"
"""How often a thread of llama.cpp's checks for the others before it sleeps (GCC's OpenMP): some microseconds. A thread
that spins for longer occupies the core that the thread it waits for needs. Next to another busy process, a step then
takes up to fifty times as long."""
SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from the one that has just finished a decode. Python's own 5 ms is a tenth
of a step."""


def main() -> None:
    """Runs the program. llama.cpp reads its environment variables when it is imported, which is later."""
    # A debugger that ggml starts at a failed assertion takes seconds and buries the assertion under its backtrace.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    if sys.argv[1:2] == ["--probe-plugin"]:
        from exo.worker.runner_cuda.loading.devices import probe_plugin
        from exo.worker.runner_cuda.plugin import PluginError

        try:
            print(probe_plugin(sys.argv[2]).model_dump_json())
        except PluginError as error:
            sys.exit(str(error))
        return
    if sys.argv[1:2] == ["--self-test"]:
        from exo.worker.runner_cuda import self_test

        print(self_test.main(sys.argv[2]))
        return
    if sys.argv[1:] != ["--probe"]:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        restart_with_huge_pages()
        sys.setswitchinterval(SWITCH_SECONDS)
    if sys.argv[1:2] == ["--rpc-server"]:
        from exo.worker.runner_cuda import rpc_server

        rpc_server.main(sys.argv[2])
    from exo.worker.runner_common.main import run  # after the restart, so that it is imported once
    from exo.worker.runner_cuda.loading.devices import probe

    run("exo.worker.runner_cuda", probe)


if __name__ == "__main__":
    main()
