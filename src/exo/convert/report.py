"""Results of a conversion: its progress, its report, or the reason for a refusal."""

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
class ConversionProgress:
    """Bytes of the target's tensor data, and the source tensor being converted."""

    done_bytes: int
    total_bytes: int
    tensor: str


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """A finished conversion. A matrix that MLX stores as weight, scales and biases counts as one tensor."""

    target: Path
    architecture: str
    tensors: int
    parameters: int
    bytes_written: int
    """Tensor data only."""
    left_out: tuple[str, ...]
    """Names in the source for which the target's format has no place. None of them changes a result."""
