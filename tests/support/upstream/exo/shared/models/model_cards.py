from dataclasses import dataclass, field

from exo.shared.types.backends import Backend
from exo.shared.types.memory import Memory


@dataclass
class ModelCard:
    model_id: str
    n_layers: int = 1
    files: list[str] = field(default_factory=list[str])
    backends: list[Backend] = field(default_factory=list[Backend])
    storage_size: Memory = field(default_factory=lambda: Memory.from_bytes(1))
    hidden_size: int = 64
    supports_tensor: bool = False
