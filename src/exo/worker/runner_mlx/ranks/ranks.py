"""The other ranks of a model that is divided between processes, on this host or on others. Rank 0, the runner, starts
them and writes its plans to their standard input.
"""

import os
import sys

import mlx.core as mx

from exo.worker.protocol.commands import Load
from exo.worker.protocol.wire import encode
from exo.worker.runner_common.part_process import PartProcess, own_address, reserved
from exo.worker.runner_mlx.loading.devices import Backend
from exo.worker.runner_mlx.probe import engine_version
from exo.worker.runner_mlx.ranks.meeting import LOOPBACK, meeting
from exo.worker.runner_mlx.ranks.messages import Meet, Plan
from exo.worker.runner_mlx.ranks.sharding import RankPart, Sharding, join, transport

BLAME_SECONDS = 1.0
"""Time for a rank's death to be noticed after the connection to it has broken."""


class Ranks:
    """Ranks 1 and up, from their start to their end. Used by the engine's thread."""

    def __init__(self, load: Load, sharding: Sharding, backend: Backend) -> None:
        """Starts the ranks and joins them to this process. They then execute ``load``. Raises LoadError."""
        by, size = transport(backend, sharding.kind), sharding.size
        self._parts: list[PartProcess] = []
        with reserved(_own_address(load)) as place:
            for rank in range(1, size):
                if load.peers:
                    peer = load.peers[rank - 1]
                    name = f"rank {rank} of {size} on {peer.name}"
                    self._parts.append(PartProcess(name, (*peer.command, "--rank", by, peer.address)))
                else:
                    module = "exo.worker.runner_mlx.ranks.rank_main"
                    command = (sys.executable, "-X", "utf8", "-m", module, by, LOOPBACK)
                    self._parts.append(PartProcess(f"rank {rank} of {size}", command, _of_rank(rank, backend)))
            places = (place, *map(_place, self._parts))
            for rank, part in enumerate(self._parts, 1):
                there = load.peers[rank - 1].directories if load.peers else load.directories
                part.say(encode(Meet(rank=rank, places=places)))
                part.say(encode(load.model_copy(update={"directories": there})))  # on which it joins
            with meeting(0, places):
                self.part = RankPart(sharding, join(by), self.tell)

    def wait_until_loaded(self) -> None:
        """Waits until all ranks have loaded. From then on, a rank's death ends this process. Raises LoadError."""
        for part in self._parts:
            if (said := part.line()) != "loaded":
                raise part.could_not("load its share", said)
        for part in self._parts:
            part.need()

    def tell(self, plan: Plan) -> None:
        """Sends a plan to the other ranks."""
        line = encode(plan)
        for part in self._parts:
            part.say(line)

    def blame(self) -> None:
        """Call it after an error in MLX: it does not return if a rank's death is the cause."""
        for part in self._parts:
            part.blame(BLAME_SECONDS / len(self._parts))

    def end(self) -> None:
        """Ends the ranks once everything queued is computed, and waits for them."""
        mx.synchronize()
        for part in self._parts:
            part.end()


def _own_address(load: Load) -> str:
    """Returns the address at which rank 0 meets the others. Raises LoadError."""
    return own_address(load.peers) if load.peers else LOOPBACK


def _place(part: PartProcess) -> str:
    """Waits until a rank is up, and returns its address and port. Raises LoadError."""
    up, _, said = (line := part.line()).partition(" ")
    if up != "up":
        raise part.could_not("start", line)
    place, _, version = said.partition(" ")
    if version != (own := engine_version()):
        raise part.could_not("join", f"it has {version}, and rank 0 has {own}")
    return place


def _of_rank(rank: int, backend: Backend) -> dict[str, str]:
    """Returns the environment variables of one rank on this host only."""
    if backend != "MlxCuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[rank] if len(visible) > rank else str(rank)}
