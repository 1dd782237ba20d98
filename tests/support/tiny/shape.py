"""The shape of a tiny model: architecture, sizes, seed and number format."""

from dataclasses import dataclass
from typing import Literal, get_args

Architecture = Literal["llama", "qwen2", "qwen3", "gemma3"]
Dtype = Literal["F32", "F16", "Q8_0", "Q4_0"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
QUANTISATION_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """The arguments of one tiny model. Equal shapes give equal bytes.

    Raises ValueError, naming the field, for what one of the two engines could not load.
    """

    architecture: Architecture = "llama"
    seed: int = 0
    vocabulary: int = 320
    """Tokens: 256 bytes, then merges, then the three special ones."""
    hidden: int = 64
    """For gemma3 best a square: mlx-lm rounds the embedding's factor, the root of this, to bfloat16."""
    feed_forward: int = 128
    layers: int | None = None
    """None: 6 for gemma3 (the sixth is its first global one), 2 for the others."""
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    context_length: int = 4096
    sliding_window: int = 16
    """Tokens seen by gemma3's local layers, the current one included; unused by the others."""
    dtype: Dtype = "F32"
    """Type of the matrices; vectors are always F32, embedding and output of a quantised model F16."""
    scale: float = 1.0
    """Multiplies every logit: above 1 the model is surer of its next token, below 1 less sure."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {self.architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}, expected a divisor of heads ({self.heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number, as rotary embeddings turn pairs")
        if self.architecture == "qwen2" and self.head_dim * self.heads != self.hidden:
            raise ValueError(f"head_dim is {self.head_dim}, expected hidden / heads ({self.hidden / self.heads:g})")
        if self.architecture == "gemma3" and self.layer_count < self.sliding_window_pattern:
            raise ValueError(f"layers is {self.layers}, expected at least {self.sliding_window_pattern} for gemma3")
        if self.quantised:
            for field, width in (("hidden", self.hidden), ("feed_forward", self.feed_forward), ("heads", self.q_width)):
                if width % QUANTISATION_BLOCK:
                    raise ValueError(f"{field} gives rows of {width}, expected a multiple of {QUANTISATION_BLOCK}")

    @property
    def layer_count(self) -> int:
        if self.layers is not None:
            return self.layers
        return 6 if self.architecture == "gemma3" else 2

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def quantised(self) -> bool:
        return self.dtype in ("Q8_0", "Q4_0")

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix too, as in the small models of these families."""
        return self.architecture in ("qwen2", "gemma3")

    @property
    def has_qkv_bias(self) -> bool:
        return self.architecture == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        return self.architecture in ("qwen3", "gemma3")

    @property
    def norm_eps(self) -> float:
        return 1e-6

    @property
    def rope_base(self) -> float:
        """Base of the layers that see the whole context."""
        return 1e4 if self.architecture == "llama" else 1e6

    @property
    def rope_base_local(self) -> float:
        """Base of gemma3's sliding-window layers."""
        return 1e4

    @property
    def sliding_window_pattern(self) -> int:
        """Every this many layers one is global. llama.cpp knows only 6 for gemma3, as the released models have it."""
        return 6
