"""Divides a network's layers between ranks. Rank 0 has the last ones, because it chooses the tokens.

This works for every network whose layers form a plain chain. Layers of other ranks are replaced by layers that return
their input; those next to this rank's own layers receive it from, or send it to, another rank.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import mlx.core as mx

from exo.worker.runner_mlx.kv_cache import KVCache, LayerCache


class Layer(Protocol):
    """One of a network's layers. It maps hidden states, shape (rows, width, hidden size), to hidden states."""

    def __call__(self, states: mx.array, /, *rest: object, **others: object) -> mx.array: ...


class Body(Protocol):
    """A network without its head."""

    layers: list[Layer]

    def __call__(self, inputs: mx.array, cache: Sequence[LayerCache], /) -> mx.array: ...


def chained(body: Body, windows: list[int | None]) -> list[mx.Dtype] | None:
    """Returns the element type of each layer's output; None unless the layers form a plain chain.

    They do if each layer gets exactly the output of the one before. A pass that is not evaluated shows it.
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
    """Replaces the layers of other ranks. Returns the layer that sends this rank's result; None on rank 0.

    ``given`` is the element type of each layer's output.
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
    """Returns the layers of one rank: at least one if there are as many layers as ranks."""
    return range(n_layers * (ranks - 1 - rank) // ranks, n_layers * (ranks - rank) // ranks)


class Elsewhere:
    """Replaces a layer that another rank has. Its weights are never read."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __call__(self, states: mx.array, /, *_: object, **__: object) -> mx.array:
        return states

    def __getattr__(self, name: str) -> object:
        """Returns an attribute of the replaced layer: networks look at attributes of their layers."""
        return getattr(self._layer, name)

    def parameters(self) -> Mapping[str, object]:
        """Returns no weights: another rank has them."""
        return {}


class Receiving(Elsewhere):
    """Replaces the layer before this rank's own. It returns the states that rank ``source`` sends."""

    def __init__(self, layer: Layer, source: int, dtype: mx.Dtype, group: mx.distributed.Group) -> None:
        super().__init__(layer)
        self._source = source
        self._dtype = dtype
        self._group = group

    def __call__(self, states: mx.array, /, *_: object, **__: object) -> mx.array:
        return mx.distributed.recv(states.shape, self._dtype, self._source, group=self._group)


class Sending(Elsewhere):
    """Replaces the layer after this rank's own. It sends their result to rank ``target``."""

    def __init__(self, layer: Layer, target: int, group: mx.distributed.Group) -> None:
        super().__init__(layer)
        self._target = target
        self._group = group
        self.sent: mx.array | None = None
        """It must be evaluated with each pass, because nothing else on this rank depends on it."""

    def __call__(self, states: mx.array, /, *_: object, **__: object) -> mx.array:
        self.sent = mx.distributed.send(states, self._target, group=self._group)
        return self.sent


class _Watched(Elsewhere):
    """A layer that records its input and its output."""

    taken: object = None
    given: object = None

    def __call__(self, states: mx.array, /, *rest: object, **others: object) -> mx.array:
        self.taken = states
        self.given = given = self._layer(states, *rest, **others)
        return given
