"""What a conversion tells its caller: how far it is, what it did, or why it could not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["mlx", "gguf"]
Dtype = Literal["f32", "f16", "bf16", "q8_0"]
Bits = Literal[4, 8]


class ConvertError(ValueError):
    """A conversion that is refused. ``subject`` is the tensor, key, file or argument at fault."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"{subject}: {reason}")
        self.subject = subject
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of the target's tensor data is written, and the source tensor being converted."""

    done_bytes: int
    total_bytes: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Report:
    """A finished conversion."""

    target: Path
    architecture: str
    tensors: int
    """Carried over. A matrix that MLX stores as weight, scales and biases is one."""
    parameters: int
    """Numbers in those tensors."""
    bytes_written: int
    """Of tensor data."""
    left_out: tuple[str, ...]
    """Names in the source for which the target's format has no place; none of them changes a result."""
