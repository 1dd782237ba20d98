"""Divides a network between processes, the ranks: each layer by its heads ("tensor"), or by layers ("pipeline").

Invariant: all ranks make the same calls in the same order, each on its share, and exchange data over ``mx.distributed``
inside these calls. A call that one rank omits would block the others for ever. Rank 0 has the logits.
"""

import faulthandler
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import mlx.core as mx

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.folder_config import Json, language_config
from exo.worker.runner_mlx.loading.devices import Backend
from exo.worker.runner_mlx.loading.options import MlxOptions
from exo.worker.runner_mlx.ranks.messages import Plan
from exo.worker.runner_mlx.ranks.pipeline import Body, Sending, chained, take_layers

Kind = Literal["tensor", "pipeline"]
Transport = Literal["ring", "nccl"]
JOIN_SECONDS = 60
"""A rank that waits longer for another one ends its process."""
OPTION: dict[Kind, str] = {"tensor": "tensor_parallel_size", "pipeline": "pipeline_parallel_size"}


class _Divisible(Protocol):
    """A model of mlx-lm that can divide its layers."""

    def shard(self, group: mx.distributed.Group) -> None: ...


@dataclass(frozen=True, slots=True)
class Sharding:
    """The division that the model card sets. ``size`` is the number of ranks, at least 2."""

    kind: Kind
    size: int

    def describe(self) -> str:
        """Returns a description such as "2 ranks by tensor"."""
        return f"{self.size} ranks by {self.kind}"


def asked_for(options: MlxOptions, config: Json, backend: Backend, hosts: int) -> Sharding | None:
    """Returns the card's division; None for one process. Several ``hosts`` have one process each.

    Raises LoadError if config.json shows it to be impossible.
    """
    sizes: dict[Kind, int] = {"tensor": options.tensor_parallel_size, "pipeline": options.pipeline_parallel_size}
    kind = max(sizes, key=lambda kind: sizes[kind])
    size = sizes[kind]
    if hosts > 1 and size == 1:
        kind, size = "pipeline", hosts
    if size == 1:
        return None
    if hosts not in (1, size):
        raise refusal(kind, size, f"each of the {hosts} hosts has one process")
    if not mx.distributed.is_available(transport(backend, kind)):
        raise refusal(kind, size, "this build of MLX cannot join processes: it has no distributed backend")
    if backend == "MlxCuda" and size // hosts > (found := mx.device_count(mx.gpu)):
        raise refusal(kind, size, f"each rank takes a GPU, and MLX finds {found}")
    sizes_of = language_config(config)
    for name in ("num_attention_heads", "num_key_value_heads") if kind == "tensor" else ():
        count = sizes_of.get(name)
        if isinstance(count, int) and count % size:
            raise refusal(kind, size, f"the model's {name} is {count}, which is not divisible by {size}")
    layers = sizes_of.get("num_hidden_layers")
    if kind == "pipeline" and isinstance(layers, int) and layers < size:
        raise refusal(kind, size, f"the model has {layers} layers, and each rank takes at least one")
    return Sharding(kind, size)


def transport(backend: Backend, kind: Kind) -> Transport:
    """Returns the transport between the ranks: NCCL for tensor parallelism on CUDA if MLX's build has it, else TCP.

    TCP uses the loopback device on a single host. MLX's CUDA back end has sums, but neither send nor receive, which a
    pipeline needs.
    """
    return "nccl" if backend == "MlxCuda" and kind == "tensor" and mx.distributed.is_available("nccl") else "ring"


def join(by: Transport) -> mx.distributed.Group:
    """Returns the group of all ranks. All of them must call this; the environment has the number of each.

    MLX waits with the interpreter locked, so only a fault handler can notice that another rank never joins.
    """
    faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
    try:
        return mx.distributed.init(strict=True, backend=by)
    finally:
        faulthandler.cancel_dump_traceback_later()


def refusal(kind: Kind, size: int, reason: str) -> LoadError:
    """Makes the error for a number of ranks in the card that is not possible."""
    return LoadError("model_misconfigured", f"model card, [mlx] {OPTION[kind]} is {size}: {reason}")


@dataclass(slots=True)
class RankPart:
    """The share of a network that this process has.

    ``tell`` sends a plan to the other ranks before rank 0 executes it. On other ranks it does nothing.
    """

    sharding: Sharding
    group: mx.distributed.Group
    tell: Callable[[Plan], None]
    _sending: Sending | None = None

    @property
    def has_results(self) -> bool:
        """Whether this rank gets a pass's results."""
        return self.sharding.kind == "tensor" or self.group.rank() == 0

    def take(self, network: object, body: Body | None, windows: list[int | None]) -> None:
        """Reduces a network to this rank's share, before its weights are read. Raises LoadError and ValueError."""
        kind, size = self.sharding.kind, self.sharding.size
        if kind == "tensor":
            cast(_Divisible, network).shard(self.group)
        elif body is None or (given := chained(body, windows)) is None:
            raise refusal(kind, size, "the layers of this kind of model do not form a plain chain")
        else:
            self._sending = take_layers(body, given, self.group)

    def share(self, tokens: mx.array) -> mx.array:
        """Returns rank 0's tokens on every rank. The other ranks pass zeros of the same shape."""
        return mx.distributed.all_sum(tokens, group=self.group)

    def computed(self, cells: list[mx.array], results: mx.array | None) -> list[mx.array]:
        """Returns the arrays that this rank must evaluate for a pass: its cells, the sent states, and its results.

        They are queued together, so that every rank takes part in the same exchanges in the same order.
        """
        sent = None if self._sending is None else self._sending.sent
        return [*cells, *(array for array in (sent, results if self.has_results else None) if array is not None)]
