"""A network's layers divided between ranks: rank 0 has the last ones, so the results are where tokens are chosen.

Works for every network whose layers are a plain chain, whatever else it does: layers that are elsewhere are replaced by
what hands their input on, and by what receives or sends it at the two ends of this rank's own.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import mlx.core as mx

from exo.worker.runner_mlx.kv_cache import KVCache, LayerCache


class Layer(Protocol):
    """One of a network's layers: hidden states, shape (rows, width, hidden size), to hidden states."""

    def __call__(self, states: mx.array, /, *rest: object, **others: object) -> mx.array: ...


class Body(Protocol):
    """A network without its head."""

    layers: list[Layer]

    def __call__(self, inputs: mx.array, cache: Sequence[LayerCache], /) -> mx.array: ...


def chained(body: Body, windows: list[int | None]) -> list[mx.Dtype] | None:
    """The type of number that each layer gives; None unless each takes just what the one before gives.

    Found out from one pass of which nothing is computed.
    """
    layers = list(body.layers)
    watched = [_Watched(layer) for layer in layers]
    body.layers[:] = watched
    try:
        body(mx.array([[0]]), KVCache(windows, 1, 1).enter([0], [0], 1))
    finally:
        body.layers[:] = layers
    linked = all(one.given is other.taken for one, other in pairwise(watched))
    given = [each.given.dtype for each in watched if isinstance(each.given, mx.array)]
    return given if linked and len(given) == len(layers) else None


def take_layers(body: Body, given: list[mx.Dtype], group: mx.distributed.Group) -> "Sending | None":
    """Leaves this rank's own layers in place; what sends their result to the rank before, if there is one.

    ``given`` is the type of number that each layer gives.
    """
    layers, rank = body.layers, group.rank()
    own = own_layers(len(layers), rank, group.size())
    for index in (*range(own.start), *range(own.stop, len(layers))):
        layers[index] = Elsewhere(layers[index])
    if own.start > 0:
        layers[own.start - 1] = Receiving(layers[own.start - 1], rank + 1, given[own.start - 1], group)
    if own.stop == len(layers):
        return None
    layers[own.stop] = sending = Sending(layers[own.stop], rank - 1, group)
    return sending


def own_layers(n_layers: int, rank: int, ranks: int) -> range:
    """Those of one rank, one at least where there are as many layers as ranks."""
    return range(n_layers * (ranks - 1 - rank) // ranks, n_layers * (ranks - rank) // ranks)


class Elsewhere:
    """In place of a layer that another rank has. Its weights are never read."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __call__(self, states: mx.array, /, *_: object, **__: object) -> mx.array:
        return states

    def __getattr__(self, name: str) -> object:
        """Networks ask their layers of what kind they are."""
        return getattr(self._layer, name)

    def parameters(self) -> Mapping[str, object]:
        """None that this rank has."""
        return {}


class Receiving(Elsewhere):
    """The last layer before this rank's own: gives what rank ``source`` sends."""

    def __init__(self, layer: Layer, source: int, dtype: mx.Dtype, group: mx.distributed.Group) -> None:
        super().__init__(layer)
        self._source = source
        self._dtype = dtype
        self._group = group

    def __call__(self, states: mx.array, /, *_: object, **__: object) -> mx.array:
        return mx.distributed.recv(states.shape, self._dtype, self._source, group=self._group)


class Sending(Elsewhere):
    """The first layer after this rank's own: sends what they gave to rank ``target``."""

    def __init__(self, layer: Layer, target: int, group: mx.distributed.Group) -> None:
        super().__init__(layer)
        self._target = target
        self._group = group
        self.sent: mx.array | None = None
        """To be computed with each pass; nothing else here depends on it."""

    def __call__(self, states: mx.array, /, *_: object, **__: object) -> mx.array:
        self.sent = mx.distributed.send(states, self._target, group=self._group)
        return self.sent


class _Watched(Elsewhere):
    """A layer that keeps what it took and gave."""

    taken: object = None
    given: object = None

    def __call__(self, states: mx.array, /, *rest: object, **others: object) -> mx.array:
        self.taken = states
        self.given = given = self._layer(states, *rest, **others)
        return given
