"""A model's sizes and constants, free of either format's names."""

from dataclasses import dataclass

from exo.convert.report import ConvertError

GEMMA3_PATTERN = 6
"""Of every released gemma3, and the only one that older readers of GGUF files know."""
_GEMMA3_LAYERS_OF_27B = 62


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by ``factor``. In gemma3 only in the layers that see the whole context."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths stretched by ``factor``, short ones kept, those between interpolated."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Of gemma3: every ``pattern``-th layer sees the whole context, the others ``size`` tokens."""

    size: int
    pattern: int
    rope_base: float
    """Of the layers with the window."""


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Sizes count elements. Raises ConvertError for sizes that contradict each other."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope_base: float
    rope_scaling: LinearScaling | Llama3Scaling | None
    sliding_window: SlidingWindow | None
    tied: bool
    """Whether the embedding serves as the output matrix too."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConvertError("key/value heads", f"{self.kv_heads} does not divide the {self.heads} heads")
        if self.head_dim % 2:
            raise ConvertError("head dimension", f"{self.head_dim} is odd, but rotary embeddings turn pairs")

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def size(self, name: str) -> int:
        """A size by the name that the tensor table uses."""
        return int(getattr(self, name))


def gemma3_query_scalar(sizes: Hyperparameters) -> int:
    """What queries are divided by the root of: the head dimension, but for the 27B model the width of a head's share.

    llama.cpp decides this by the number of layers and has no key for it.
    """
    return sizes.hidden // sizes.heads if sizes.layers == _GEMMA3_LAYERS_OF_27B else sizes.head_dim
