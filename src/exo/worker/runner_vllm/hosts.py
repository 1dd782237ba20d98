"""A model that is divided among hosts: this one leads, and each of the others has a follower with the same settings."""

import psutil

from exo.worker.protocol.commands import Load
from exo.worker.protocol.messages import Message
from exo.worker.protocol.wire import encode
from exo.worker.runner_common.part_process import PartProcess
from exo.worker.runner_vllm.probe import engine_version


class HostPlace(Message):
    """The place of a host in the group. The hosts meet at the leader's address and port."""

    rank: int
    hosts: int
    leader: str
    port: int

    @property
    def arguments(self) -> dict[str, object]:
        """The engine's arguments, by vLLM's names."""
        return {
            "distributed_executor_backend": "mp",
            "nnodes": self.hosts,
            "node_rank": self.rank,
            "master_addr": self.leader,
            "master_port": self.port,
        }


class Follow(Message):
    """The first line of a follower's input."""

    load: Load
    place: HostPlace


def start_followers(load: Load, leader: str, port: int) -> HostPlace:
    """Starts a follower on each peer and returns this host's place. The end of one then ends this process.

    Raises LoadError.
    """
    hosts = 1 + len(load.peers)
    parts = [PartProcess(f"host {peer.name}", (*peer.command, "--follow", peer.address)) for peer in load.peers]
    for rank, (peer, part) in enumerate(zip(load.peers, parts, strict=True), 1):
        there = load.model_copy(update={"directories": peer.directories})
        part.say(encode(Follow(load=there, place=HostPlace(rank=rank, hosts=hosts, leader=leader, port=port))))
    for part in parts:
        up, _, version = (line := part.line()).partition(" ")
        if up != "up":
            raise part.could_not("load its share", line)
        if version != (own := engine_version()):
            raise part.could_not("load its share", f"it has {version}, and this host has {own}")
        part.need()
    return HostPlace(rank=0, hosts=hosts, leader=leader, port=port)


def interface(address: str) -> str:
    """Returns the name of this host's network interface with an address; empty if there is none."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(each.address == address for each in addresses)), "")
