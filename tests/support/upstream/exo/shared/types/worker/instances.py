from dataclasses import dataclass

from exo.shared.types.backends import Backend


@dataclass
class LlamaCppInstance:
    backend: Backend


@dataclass
class Card:
    model_id: str
    n_layers: int
    files: list[str]


@dataclass
class Shard:
    model_card: Card


@dataclass
class BoundInstance:
    instance: object
    bound_shard: Shard
