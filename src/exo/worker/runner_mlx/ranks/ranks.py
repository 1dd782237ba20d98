"""The other ranks of a model that is divided between processes. Rank 0, the runner, starts them as its children.

Rank 0 writes its plans to their standard input, and they end when that closes. If one of them ends, rank 0 ends too: it
cannot compute without it, and the server handles the death of a runner.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from exo.worker.protocol.commands import Load
from exo.worker.protocol.wire import encode, exit_now
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_mlx.loading.devices import Backend
from exo.worker.runner_mlx.ranks.messages import Plan
from exo.worker.runner_mlx.ranks.sharding import RankPart, Sharding, join, transport

END_SECONDS = 5.0
"""Time for a rank to exit at the end."""
BLAME_SECONDS = 1.0
"""Time for a rank's death to be noticed after the connection to it has broken."""

_LOOPBACK = "127.0.0.1"

Process = subprocess.Popen[bytes]


class Ranks:
    """Ranks 1 and up, from their start to their end. Used by the engine's thread."""

    def __init__(self, load: Load, sharding: Sharding, backend: Backend) -> None:
        """Starts the ranks and joins them to this process. They then execute ``load``. Raises LoadError."""
        self._size = sharding.size
        self._ending = False
        self._watching: list[threading.Thread] = []
        by = transport(backend, sharding.kind)
        with _meeting_place(sharding.size) as place:
            environments = [{**place, **_of_rank(rank, backend)} for rank in range(sharding.size)]
            self._processes = [_start(by, environment) for environment in environments[1:]]
            for rank, process in enumerate(self._processes, 1):
                if (said := _line(process)) != "up":
                    raise self._could_not(rank, process, "start", said)
            self.tell(load)  # on which they join
            with _environment({**place, "MLX_RANK": "0"}):
                self.part = RankPart(sharding, join(by), self.tell)

    def wait_until_loaded(self) -> None:
        """Waits until all ranks have loaded. From then on, a rank's death ends this process. Raises LoadError."""
        for rank, process in enumerate(self._processes, 1):
            if (said := _line(process)) != "loaded":
                raise self._could_not(rank, process, "load its share", said)
        for rank, process in enumerate(self._processes, 1):
            thread = threading.Thread(target=self._watch, args=(rank, process), name=f"rank {rank}", daemon=True)
            thread.start()
            self._watching.append(thread)

    def tell(self, plan: Plan) -> None:
        """Sends a plan to the other ranks. A dead rank is skipped: its watcher ends this process."""
        line = encode(plan)
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()

    def blame(self) -> None:
        """Call it after an error in MLX: it does not return if a rank's death is the cause."""
        for thread in self._watching:
            thread.join(BLAME_SECONDS / len(self._watching))

    def end(self) -> None:
        """Ends the ranks once everything queued is computed, and waits for them."""
        mx.synchronize()
        self._ending = True
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def _watch(self, rank: int, process: Process) -> None:
        how = _ended(process)
        if not self._ending:
            print(f"rank {rank} of {self._size} {how}; the runner cannot compute without it", file=sys.stderr)
            exit_now(1)

    def _could_not(self, rank: int, process: Process, what: str, said: str) -> LoadError:
        reason = said or f"it {_ended(process)}"
        return LoadError("model_load_failed", f"rank {rank} of {self._size} could not {what}: {reason}")


@contextmanager
def _meeting_place(ranks: int) -> Generator[dict[str, str]]:
    """Yields the environment variables by which MLX's ranks find each other, with ports that are reserved meanwhile.

    The ports are bound but not listened on. Linux then gives them to no other program, except to MLX, which asks for
    them by number.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(ranks)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind((_LOOPBACK, 0))
        ports = [int(each.getsockname()[1]) for each in sockets]
        hosts = Path(stack.enter_context(TemporaryDirectory(prefix="exo-ranks-"))) / "hosts.json"
        hosts.write_text(json.dumps([[f"{_LOOPBACK}:{port}"] for port in ports]))
        nccl = {"NCCL_HOST_IP": _LOOPBACK, "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(ranks)}
        yield {"MLX_HOSTFILE": str(hosts), **nccl}


def _of_rank(rank: int, backend: Backend) -> dict[str, str]:
    """Returns the environment variables of one rank only."""
    own = {"MLX_RANK": str(rank)}
    if backend == "MlxCuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        own["CUDA_VISIBLE_DEVICES"] = visible[rank] if len(visible) > rank else str(rank)
    if backend == "MlxCpu":
        # On a CPU, MLX compiles into files that all processes share without a lock. Ranks work in step, so they would
        # write and open the same file at the same time.
        own["MLX_DISABLE_COMPILE"] = "1"
    return own


@contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None]:
    """Sets environment variables of this process, and restores them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(by: str, environment: Mapping[str, str]) -> Process:
    command = [sys.executable, "-X", "utf8", "-m", "exo.worker.runner_mlx.ranks.rank_main", by]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env={**os.environ, **environment})


def _line(process: Process) -> str:
    """Returns the next line that a rank writes; empty if it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().decode(errors="replace").strip()


def _ended(process: Process) -> str:
    """Waits for a process to end, and returns how it did."""
    code = process.wait()
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
