"""How a network is divided between processes, the ranks: each layer by its heads (tensor), or by layers (pipeline).

All ranks make the same calls in the same order, each on its share; what one has and another lacks goes between them
over ``mx.distributed`` inside these calls. Rank 0 has what the tokens are chosen from.
"""

import faulthandler
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import mlx.core as mx

from exo.worker.runner_common.folder_config import Json, language_config
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_mlx.devices import Backend
from exo.worker.runner_mlx.options import MlxOptions
from exo.worker.runner_mlx.ranks.messages import Plan
from exo.worker.runner_mlx.ranks.pipeline import Body, Sending, chained, take_layers

Kind = Literal["tensor", "pipeline"]
Transport = Literal["ring", "nccl"]
JOIN_SECONDS = 60
"""After which a rank that waits for another ends its process."""
OPTION: dict[Kind, str] = {"tensor": "tensor_parallel_size", "pipeline": "pipeline_parallel_size"}


class _Divisible(Protocol):
    """Those of mlx-lm's models that ``model.divides_layers``."""

    def shard(self, group: mx.distributed.Group) -> None: ...


@dataclass(frozen=True, slots=True)
class Sharding:
    """What the card asks for. ``size`` counts ranks, 2 at least."""

    kind: Kind
    size: int

    def describe(self) -> str:
        """Such as "2 ranks by tensor"."""
        return f"{self.size} ranks by {self.kind}"


def asked_for(options: MlxOptions, config: Json, backend: Backend) -> Sharding | None:
    """None for one process. Raises LoadError for what cannot be, as far as the folder's config.json tells."""
    sizes: dict[Kind, int] = {"tensor": options.tensor_parallel_size, "pipeline": options.pipeline_parallel_size}
    kind = max(sizes, key=lambda kind: sizes[kind])
    size = sizes[kind]
    if size == 1:
        return None
    if not mx.distributed.is_available(transport(backend, kind)):
        raise refusal(kind, size, "this build of MLX cannot join processes: it has no distributed backend")
    if backend == "MlxCuda" and size > (found := mx.device_count(mx.gpu)):
        raise refusal(kind, size, f"each rank takes a GPU, and MLX sees {found}")
    sizes_of = language_config(config)
    for name in ("num_attention_heads", "num_key_value_heads") if kind == "tensor" else ():
        count = sizes_of.get(name)
        if isinstance(count, int) and count % size:
            raise refusal(kind, size, f"the model's {name} is {count}, which does not divide by {size}")
    layers = sizes_of.get("num_hidden_layers")
    if kind == "pipeline" and isinstance(layers, int) and layers < size:
        raise refusal(kind, size, f"the model has {layers} layers, and each rank takes one at least")
    return Sharding(kind, size)


def transport(backend: Backend, kind: Kind) -> Transport:
    """What joins the ranks: NCCL between CUDA devices, where MLX's build has it; TCP on the loopback device elsewhere.

    MLX's CUDA back end has sums but neither send nor receive, so a pipeline goes over TCP there as well.
    """
    return "nccl" if backend == "MlxCuda" and kind == "tensor" and mx.distributed.is_available("nccl") else "ring"


def join(by: Transport) -> mx.distributed.Group:
    """The group of all ranks, which call this together, each with its place among them in the environment.

    MLX waits with the interpreter locked, so that nothing else here could notice that another rank never comes.
    """
    faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True)
    try:
        return mx.distributed.init(strict=True, backend=by)
    finally:
        faulthandler.cancel_dump_traceback_later()


def refusal(kind: Kind, size: int, reason: str) -> LoadError:
    """Why the card's number of ranks cannot be."""
    return LoadError("model_misconfigured", f"model card, [mlx] {OPTION[kind]} is {size}: {reason}")


@dataclass(slots=True)
class RankPart:
    """The share of a network that a process has.

    ``tell`` passes a plan on to the other ranks, before rank 0 does what it says; on others it does nothing.
    """

    sharding: Sharding
    group: mx.distributed.Group
    tell: Callable[[Plan], None]
    _sending: Sending | None = None

    @property
    def has_results(self) -> bool:
        """Whether what a pass computes ends here."""
        return self.sharding.kind == "tensor" or self.group.rank() == 0

    def take(self, network: object, body: Body | None, windows: list[int | None]) -> None:
        """Leaves this rank's share of a network, whose weights are not read yet. Raises LoadError, ValueError."""
        kind, size = self.sharding.kind, self.sharding.size
        if kind == "tensor":
            cast(_Divisible, network).shard(self.group)
        elif body is None or (given := chained(body, windows)) is None:
            raise refusal(kind, size, "the layers of this kind of model are no plain chain")
        else:
            self._sending = take_layers(body, given, self.group)

    def share(self, tokens: mx.array) -> mx.array:
        """Rank 0's tokens, on every rank; the others give as many zeros."""
        return mx.distributed.all_sum(tokens, group=self.group)

    def computed(self, cells: list[mx.array], results: mx.array | None) -> list[mx.array]:
        """What this rank computes of a pass: its cells, what it sends, and the results where they are wanted and here.

        Queued at once and whole, so that every rank takes part in the same exchanges, in the same order.
        """
        sent = None if self._sending is None else self._sending.sent
        return [*cells, *(array for array in (sent, results if self.has_results else None) if array is not None)]
