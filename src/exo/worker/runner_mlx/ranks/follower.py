"""The work of every rank but rank 0: it loads its share, then repeats rank 0's calls in the same order."""

from queue import SimpleQueue
from typing import BinaryIO, cast

import mlx.core as mx

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.part_process import reserved
from exo.worker.runner_mlx.kv_cache import KVCache
from exo.worker.runner_mlx.loading.loader import check, open_model
from exo.worker.runner_mlx.model import MlxModel
from exo.worker.runner_mlx.probe import engine_version
from exo.worker.runner_mlx.ranks.meeting import meeting
from exo.worker.runner_mlx.ranks.messages import PLANS, Clear, Meet, Pass, TextPass
from exo.worker.runner_mlx.ranks.sharding import RankPart, Transport, join

PASSES_PER_SWEEP = 256
"""The number of passes after which MLX frees the buffers that it keeps for reuse."""


def follow(lines: SimpleQueue[bytes], said: BinaryIO, by: str, address: str) -> None:
    """Executes the plans in ``lines`` for ever. Returns only if the model cannot be loaded. Raises MLX's errors.

    The ranks meet at this host's ``address``.
    """
    with reserved(address) as place:
        said.write(f"up {place} {engine_version()}\n".encode())
        meet, load = PLANS.validate_json(lines.get()), PLANS.validate_json(lines.get())
        assert isinstance(meet, Meet)
        assert isinstance(load, Load)
        if load.backend == "MlxCpu":
            # On a CPU, MLX compiles into files that all processes share without a lock. Ranks work in step, so they
            # would write and open the same file at the same time.
            mx.disable_compile()
        with meeting(meet.rank, meet.places):
            group = join(cast(Transport, by))
    try:
        model, cache = _load(load, group)
    except LoadError as error:
        said.write(f"{error}\n".encode())
        return
    said.write(b"loaded\n")
    text = cache
    passes = 0
    while True:
        match PLANS.validate_json(lines.get()):
            case Pass(slots=slots, starts=starts, width=width, whole=whole):
                model.forward(_no_tokens(len(slots), width), cache, slots, starts, whole=whole)
            case TextPass(start=start, width=width, cells=cells):
                text = KVCache(model.windows, 1, cells) if start == 0 else text
                model.states(_no_tokens(1, width), text, start)
            case Clear(slot=slot, start=start, stop=stop):
                model.clear(cache, slot, start, stop)
            case Meet() | Load():
                raise ValueError("a rank meets the others and loads once")
        passes += 1
        if passes % PASSES_PER_SWEEP == 0:
            mx.clear_cache()


def _load(load: Load, group: mx.distributed.Group) -> tuple[MlxModel, KVCache]:
    checked = check(load)
    assert checked.sharding is not None
    part = RankPart(checked.sharding, group, lambda _: None)
    return open_model(checked, lambda _done, _total: None, part)


def _no_tokens(rows: int, width: int) -> mx.array:
    """Returns zeros, to which rank 0's tokens are added."""
    return mx.zeros((rows, width), mx.int32)
