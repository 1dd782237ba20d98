from dataclasses import dataclass
from enum import StrEnum

from exo.shared.models.model_cards import ModelCard
from exo.shared.types.backends import Backend


class InstanceMeta(StrEnum):
    MlxRing = "MlxRing"
    MlxJaccl = "MlxJaccl"
    LlamaCpp = "LlamaCpp"


@dataclass
class LlamaCppInstance:
    backend: Backend


@dataclass
class Shard:
    model_card: ModelCard


@dataclass
class BoundInstance:
    instance: object
    bound_shard: Shard
