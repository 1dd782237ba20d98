"""Writes models of real shapes with random weights. Quantised blocks are drawn in their stored form."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from bench.gpu_check.options import Options
from tests.support.tiny.gguf_file import Stored, write_stored
from tests.support.tiny.shape import QUANTISATION_BLOCK, Shape
from tests.support.tiny.tokenizer import Tokenizer

_OUTPUT_GAIN = 3.0
"""Standard deviation of the logits."""
_BLOCK_BYTES = {"Q8_0": 2 + QUANTISATION_BLOCK, "Q4_0": 2 + QUANTISATION_BLOCK // 2}
_DEVIATION = {"Q8_0": 256 / math.sqrt(12), "Q4_0": 16 / math.sqrt(12)}
"""The standard deviation of a block's uniformly drawn integers. A weight is an integer times the block's scale."""


_WRITING = threading.Lock()


@dataclass(frozen=True, slots=True)
class CheckedModel:
    name: str
    shape: Shape


_LLAMA_8B = {"vocabulary": 128_256, "hidden": 4096, "feed_forward": 14_336, "layers": 32, "heads": 32, "kv_heads": 8}
_GEMMA_1B = {"vocabulary": 262_144, "hidden": 1152, "feed_forward": 6912, "layers": 26, "heads": 4, "kv_heads": 1}
MODELS = (
    CheckedModel("8b-q4_0", Shape("llama", head_dim=128, context_length=32_768, dtype="Q4_0", **_LLAMA_8B)),
    CheckedModel(
        "1b-262144-tokens",
        Shape("gemma3", head_dim=256, context_length=8192, dtype="Q8_0", sliding_window=512, **_GEMMA_1B),
    ),
)
"""The sizes of Llama 3.1 8B and of Gemma 3 1B."""
SMALL_MODELS = (
    CheckedModel(
        "small-q4_0", Shape("llama", vocabulary=2048, hidden=256, feed_forward=512, head_dim=64, dtype="Q4_0")
    ),
    CheckedModel(
        "small-gemma", Shape("gemma3", vocabulary=8192, hidden=256, feed_forward=512, head_dim=64, dtype="Q8_0")
    ),
)


def models(options: Options) -> tuple[CheckedModel, ...]:
    return SMALL_MODELS if options.small else MODELS


def file_of(options: Options, model: CheckedModel) -> Path:
    """The model's file. The first call writes it; one from another thread waits for it."""
    path = options.work / "models" / f"{model.name}.gguf"
    with _WRITING:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            write_random(unfinished, model.shape)
            unfinished.rename(path)
    return path


def write_random(path: Path, shape: Shape) -> None:
    """Writes a quantised model whose weights keep the lengths of the network's vectors.

    Tensors of one size have the same blocks in every layer, because the values do not affect the speed.
    """
    write_stored(path, shape, Tokenizer.of_size(shape.vocabulary), _tensors(shape))


def _tensors(shape: Shape) -> Iterator[Stored]:
    draw = _blocks(shape)
    faint = 1 / math.sqrt(2 * shape.layer_count)
    yield _stored(shape, "token_embd", draw(shape.vocabulary, shape.hidden, _OUTPUT_GAIN))
    if not shape.tied:
        yield _stored(shape, "output", draw(shape.vocabulary, shape.hidden, _OUTPUT_GAIN))
    yield _ones("output_norm", shape.hidden)
    for layer in range(shape.layer_count):
        block = f"blk.{layer}"
        for name, rows, columns, gain in (
            ("attn_q", shape.q_width, shape.hidden, 1.0),
            ("attn_k", shape.kv_width, shape.hidden, 1.0),
            ("attn_v", shape.kv_width, shape.hidden, 1.0),
            ("attn_output", shape.hidden, shape.q_width, faint),
            ("ffn_gate", shape.feed_forward, shape.hidden, 1.0),
            ("ffn_up", shape.feed_forward, shape.hidden, 1.0),
            ("ffn_down", shape.hidden, shape.feed_forward, faint),
        ):
            yield _stored(shape, f"{block}.{name}", draw(rows, columns, gain))
        norms = ["attn_norm", "ffn_norm"]
        if shape.architecture == "gemma3":
            norms += ["post_attention_norm", "post_ffw_norm"]
        for name in norms:
            yield _ones(f"{block}.{name}", shape.hidden)
        if shape.has_qk_norm:
            yield _ones(f"{block}.attn_q_norm", shape.head_dim)
            yield _ones(f"{block}.attn_k_norm", shape.head_dim)


def _blocks(shape: Shape) -> Callable[[int, int, float], NDArray[np.uint8]]:
    random = np.random.default_rng(shape.seed)
    size, deviation = _BLOCK_BYTES[shape.dtype], _DEVIATION[shape.dtype]

    @cache
    def draw(rows: int, columns: int, gain: float) -> NDArray[np.uint8]:
        """[rows, bytes per row]; maps a vector with a root mean square of 1 to one of about ``gain``."""
        blocks = np.frombuffer(random.bytes(rows * columns // QUANTISATION_BLOCK * size), np.uint8).copy()
        scale = np.array([gain / (math.sqrt(columns) * deviation)], np.float16)
        blocks.reshape(-1, size)[:, :2] = scale.view(np.uint8)
        return blocks.reshape(rows, -1)

    return draw


def _stored(shape: Shape, name: str, blocks: NDArray[np.uint8]) -> Stored:
    return f"{name}.weight", blocks, gguf.GGMLQuantizationType[shape.dtype]


def _ones(name: str, size: int) -> Stored:
    return f"{name}.weight", np.ones(size, np.float32), gguf.GGMLQuantizationType.F32
