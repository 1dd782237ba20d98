"""How MLX's ranks find each other: each has a port of its own, and all know all of them."""

import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

LOOPBACK = "127.0.0.1"


@contextmanager
def meeting(rank: int, places: Sequence[str]) -> Generator[None]:
    """Sets the environment variables with which rank ``rank`` joins the others. ``places`` are those of all ranks."""
    address, _, port = places[0].rpartition(":")
    with TemporaryDirectory(prefix="exo-ranks-") as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[place] for place in places]))
        nccl = {"NCCL_HOST_IP": address, "NCCL_PORT": port, "MLX_WORLD_SIZE": str(len(places))}
        with _environment({"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), **nccl}):
            yield


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
