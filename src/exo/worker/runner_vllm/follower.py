"""``--follow ADDRESS``: computes this host's share of a model whose runner is on another host.

It reads one line, ``Follow``, writes "up" and its version, or why it cannot, and ends with its input. The program that
has started it then ends its workers.
"""

import sys
import threading
from collections.abc import Iterator

from exo.worker.protocol.wire import exit_now, take_protocol_stream
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.main import die
from exo.worker.runner_common.model_files.model_folder import presented
from exo.worker.runner_common.part_process import lines_while_needed
from exo.worker.runner_vllm.checked import check
from exo.worker.runner_vllm.hosts import Follow, interface
from exo.worker.runner_vllm.loader import engine_arguments, set_engine_compute
from exo.worker.runner_vllm.probe import engine_version
from exo.worker.runner_vllm.switches import set_network


def main(address: str) -> None:
    """Runs the program. Does not return."""
    said, lines = take_protocol_stream(), lines_while_needed()
    sys.excepthook = die
    follow = Follow.model_validate_json(next(lines))
    try:
        checked = check(follow.load)
        if not (name := interface(address)):
            raise LoadError("model_load_failed", f"{address} is no address of this host")
    except LoadError as error:
        said.write(f"{error}\n".encode())
        exit_now(1)
    threading.Thread(target=_end_with_input, args=(lines,), name="reader", daemon=True).start()
    set_network(address, name)
    set_engine_compute(checked)
    said.write(f"up {engine_version()}\n".encode())
    from exo.worker.runner_vllm.vllm_edge import follow as compute

    with presented(checked.folder, checked.folder.written) as view:
        compute({**engine_arguments(checked, view), **follow.place.arguments}, checked.purpose.pooling)
    exit_now(1)


def _end_with_input(lines: Iterator[bytes]) -> None:
    for _ in lines:
        pass
    exit_now(0)
