"""Random weights under Hugging Face's names and layout, as float32.

The spread of the numbers is chosen so that the model is a useful test subject, not a plausible language model:

- Logits of the preferred tokens have a standard deviation of about 4 and the next token about two nats of entropy at
  the default size: ties are rare, sampling at temperature 1 varies, float32 rounding moves a log-probability by 1e-4.
- Channel 0 of the residual stream holds a constant that no block reads or writes. Through it the output matrix prefers
  printable ASCII: other bytes, control characters and special tokens, the end of sequence among them, stay about ten
  logits behind. So a generation is readable text that ends by length, unless a test biases it otherwise.
- The other channels of the final norm are negative and the output matrix resembles the embedding (is it, when tied), so
  the token just read votes against itself: greedy decoding does not stick to one token. Attention adds several times
  what the embedding put into the residual stream, so the text depends on the context and hardly ever cycles.
- gemma3's feed-forward blocks are kept faint: ggml computes GELU on the CPU from a table in half precision, the largest
  difference there is between the engines.
"""

import numpy as np
from numpy.typing import NDArray

from tests.support.tiny.shape import Shape
from tests.support.tiny.tokenizer import Tokenizer

Tensor = NDArray[np.float32]

FINAL_NORM = 4.0
QUERY_KEY = 2.0
"""Root mean square of queries and keys without norms of their own."""
QUERY_KEY_NORM = 1.5

# How much all blocks of a kind together put into the residual stream, in embeddings. The first two are rough, as the
# blocks' own arithmetic matters; gemma norms what its blocks put out, so its two are exact.
ATTENTION = 4.0
FEED_FORWARD = 1.5
GEMMA_ATTENTION = 8.0
GEMMA_FEED_FORWARD = 0.1


class _Draw:
    """Seeded random tensors, drawn in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def matrix(self, rows: int, columns: int, gain: float) -> Tensor:
        """Maps a vector of root mean square 1 to one of about `gain`."""
        values = self._generator.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(gain / np.sqrt(columns))

    def writer(self, rows: int, columns: int, gain: float) -> Tensor:
        """A matrix that does not touch channel 0 of the residual stream."""
        weight = self.matrix(rows, columns, gain)
        weight[0, :] = 0
        return weight

    def vector(self, size: int, mean: float, deviation: float) -> Tensor:
        """Multiples of 1/1024, so that adding or taking off gemma's norm offset of 1 is exact."""
        values = mean + deviation * self._generator.standard_normal(size, dtype=np.float32)
        return np.round(values * 1024).astype(np.float32) / np.float32(1024)


def make_weights(shape: Shape) -> dict[str, Tensor]:
    """Every tensor of `shape` by its Hugging Face name, matrices as [out, in]."""
    draw = _Draw(shape.seed)
    preference = _preference(shape)
    embedding = draw.matrix(shape.vocabulary, shape.hidden, 1.0)
    embedding[:, 0] = preference
    weights = {"model.embed_tokens.weight": embedding}
    for layer in range(shape.layer_count):
        for name, tensor in (_attention(draw, shape) | _feed_forward(draw, shape) | _norms(draw, shape, layer)).items():
            weights[f"model.layers.{layer}.{name}"] = tensor
    weights["model.norm.weight"] = _final_norm(draw, shape)
    if not shape.tied:
        output = (embedding + draw.matrix(shape.vocabulary, shape.hidden, 1.0)) * np.float32(np.sqrt(0.5))
        output[:, 0] = preference
        weights["lm_head.weight"] = output
    return weights


def _preference(shape: Shape) -> Tensor:
    """Channel 0 of the embedding and output rows, [vocabulary].

    Only half as much for tokens that are not preferred: the preference holds after those as well.
    """
    level = _level(shape)
    tokens = Tokenizer.of_size(shape.vocabulary).tokens
    return np.array([level if token.printable else level / 2 for token in tokens], np.float32)


def _level(shape: Shape) -> float:
    """The constant in channel 0; the power of `hidden` keeps the lead it gives, in logits, alike at every size."""
    return 10.0 / shape.hidden**0.25


def _attention(draw: _Draw, shape: Shape) -> dict[str, Tensor]:
    tensors = {
        "self_attn.q_proj.weight": draw.matrix(shape.q_width, shape.hidden, QUERY_KEY),
        "self_attn.k_proj.weight": draw.matrix(shape.kv_width, shape.hidden, QUERY_KEY),
        "self_attn.v_proj.weight": draw.matrix(shape.kv_width, shape.hidden, 1.0),
        "self_attn.o_proj.weight": draw.writer(shape.hidden, shape.q_width, _block_gain(shape, ATTENTION)),
    }
    if shape.has_qkv_bias:
        tensors["self_attn.q_proj.bias"] = draw.vector(shape.q_width, 0.0, 0.3)
        tensors["self_attn.k_proj.bias"] = draw.vector(shape.kv_width, 0.0, 0.3)
        tensors["self_attn.v_proj.bias"] = draw.vector(shape.kv_width, 0.0, 0.3)
    if shape.has_qk_norm:
        tensors["self_attn.q_norm.weight"] = _norm(draw, shape, shape.head_dim, QUERY_KEY_NORM)
        tensors["self_attn.k_norm.weight"] = _norm(draw, shape, shape.head_dim, QUERY_KEY_NORM)
    return tensors


def _feed_forward(draw: _Draw, shape: Shape) -> dict[str, Tensor]:
    return {
        "mlp.gate_proj.weight": draw.matrix(shape.feed_forward, shape.hidden, 2.0),
        "mlp.up_proj.weight": draw.matrix(shape.feed_forward, shape.hidden, 1.0),
        "mlp.down_proj.weight": draw.writer(shape.hidden, shape.feed_forward, _block_gain(shape, FEED_FORWARD)),
    }


def _block_gain(shape: Shape, total: float) -> float:
    """The gain of one block's last matrix for all blocks together to add `total` embeddings."""
    return total / float(np.sqrt(shape.hidden * shape.layer_count))


def _norms(draw: _Draw, shape: Shape, layer: int) -> dict[str, Tensor]:
    before_attention = _reading_norm(draw, shape, 1.0 if layer == 0 else ATTENTION)
    before_feed_forward = _reading_norm(draw, shape, ATTENTION)
    if shape.architecture != "gemma3":
        return {"input_layernorm.weight": before_attention, "post_attention_layernorm.weight": before_feed_forward}
    blocks = float(np.sqrt(shape.layer_count))
    return {
        "input_layernorm.weight": before_attention,
        "post_attention_layernorm.weight": _norm(draw, shape, shape.hidden, GEMMA_ATTENTION / blocks),
        "pre_feedforward_layernorm.weight": before_feed_forward,
        "post_feedforward_layernorm.weight": _norm(draw, shape, shape.hidden, GEMMA_FEED_FORWARD / blocks),
    }


def _reading_norm(draw: _Draw, shape: Shape, embeddings: float) -> Tensor:
    """Drops channel 0 and brings the others, `embeddings` large by then, to a root mean square of about 1."""
    mean = float(np.hypot(1, _level(shape) / embeddings))
    weight = draw.vector(shape.hidden, mean, 0.1 * mean)
    weight[0] = 0
    return _stored_norm(shape, weight)


def _final_norm(draw: _Draw, shape: Shape) -> Tensor:
    weight = draw.vector(shape.hidden, FINAL_NORM * shape.scale, 0.1 * FINAL_NORM * shape.scale)
    weight[1:] *= -1
    return _stored_norm(shape, weight)


def _norm(draw: _Draw, shape: Shape, size: int, mean: float) -> Tensor:
    return _stored_norm(shape, draw.vector(size, mean, 0.1 * mean))


def _stored_norm(shape: Shape, weight: Tensor) -> Tensor:
    """gemma's files hold norm weights minus 1."""
    return weight - np.float32(1) if shape.architecture == "gemma3" else weight
