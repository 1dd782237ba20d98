"""The choice of an engine for a model, as a pure function that upstream's placement calls."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

_Meta = TypeVar("_Meta")
_Backend = TypeVar("_Backend")


def route_instance_meta(
    asked: _Meta,
    wanted: Iterable[_Backend],
    on_nodes: Iterable[Iterable[_Backend]],
    served: Mapping[_Meta, Iterable[_Backend]],
) -> _Meta:
    """Returns the kind of instance to place: the one that was asked for if the model card lists a backend of it.

    Otherwise it is the kind that serves the first backend of the card, ``wanted``, that some node has. Dashboard and
    API then need not name an engine. If no node has any, it is ``asked``, whose placement says why it cannot be.
    """
    wanted = tuple(wanted)
    if set(wanted) & set(served.get(asked, ())):
        return asked
    present = {backend for each in on_nodes for backend in each}
    for backend in wanted:
        for meta, backends in served.items():
            if backend in present and backend in tuple(backends):
                return meta
    return asked
