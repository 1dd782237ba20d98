"""A tiny random BERT as a GGUF file, for embeddings or with a head that ranks, and the same model in numpy.

Everything is float32. Weights are drawn so that each layer changes the vectors by about as much as they are long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

import gguf
import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[np.float32]
Pooling = Literal["none", "mean", "cls", "last", "rank"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNKNOWN, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))
WORDS = ("the", "and", "sea", "stone", "river", "quick", "brown", "fox", "what", "is")

# llama.cpp marks the token that begins a word with this; its other WordPiece tokens go on within one.
WORD = "\u2581"
VOCABULARY = (
    *SPECIAL_TOKENS,
    *(WORD + letter for letter in ascii_lowercase),
    *ascii_lowercase,
    *(WORD + word for word in WORDS),
)
NORM_EPS = 1e-12


@dataclass(frozen=True)
class Encoder:
    """A model; equal arguments give equal bytes."""

    pooling: Pooling = "mean"
    """The pooling that the file states; "rank" adds a head with a dense layer and one output."""
    template: str | None = None
    """The form in which the model expects query and document."""
    seed: int = 0
    hidden: int = 32
    feed_forward: int = 64
    layers: int = 2
    heads: int = 4
    context_length: int = 128

    def write(self, path: Path) -> None:
        """Write the model to `path`, replacing what is there."""
        writer = gguf.GGUFWriter(path, "bert")
        writer.add_name(f"tiny bert {self.seed}")
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(len(VOCABULARY))
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_block_count(self.layers)
        writer.add_head_count(self.heads)
        writer.add_layer_norm_eps(NORM_EPS)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType[self.pooling.upper()])
        self._add_tokenizer(writer)
        if self.template is not None:
            writer.add_chat_template([{"name": "rerank", "template": self.template}])
        for name, tensor in self.weights.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _add_tokenizer(self, writer: gguf.GGUFWriter) -> None:
        kinds = {"[UNK]": gguf.TokenType.UNKNOWN} | dict.fromkeys(
            ("[PAD]", "[CLS]", "[SEP]", "[MASK]"), gguf.TokenType.CONTROL
        )
        writer.add_tokenizer_model("bert")
        writer.add_token_list(list(VOCABULARY))
        writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in VOCABULARY])
        writer.add_token_type_count(2)
        writer.add_bos_token_id(CLS)
        writer.add_sep_token_id(SEP)
        writer.add_unk_token_id(UNKNOWN)
        writer.add_pad_token_id(PAD)
        writer.add_mask_token_id(MASK)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Every tensor by its GGUF name, matrices as [out, in]."""
        draw = np.random.default_rng(self.seed)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
            return (draw.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

        def vector(size: int, mean: float = 0.0) -> Tensor:
            return (mean + 0.1 * draw.standard_normal(size)).astype(np.float32)

        def norm(name: str) -> dict[str, Tensor]:
            return {f"{name}.weight": vector(self.hidden, 1.0), f"{name}.bias": vector(self.hidden)}

        def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> dict[str, Tensor]:
            return {f"{name}.weight": matrix(rows, columns, gain), f"{name}.bias": vector(rows)}

        width, inner = self.hidden, self.feed_forward
        weights = {
            "token_embd.weight": matrix(len(VOCABULARY), width, np.sqrt(width)),
            "token_types.weight": matrix(2, width),
            "position_embd.weight": matrix(self.context_length, width, np.sqrt(width) / 2),
            **norm("token_embd_norm"),
        }
        for layer in range(self.layers):
            block = f"blk.{layer}"
            for name in ("attn_q", "attn_k"):
                weights |= linear(f"{block}.{name}", width, width, 2.0)
            for name in ("attn_v", "attn_output"):
                weights |= linear(f"{block}.{name}", width, width)
            weights |= norm(f"{block}.attn_output_norm")
            weights |= linear(f"{block}.ffn_up", inner, width) | linear(f"{block}.ffn_down", width, inner)
            weights |= norm(f"{block}.layer_output_norm")
        if self.pooling == "rank":
            weights |= linear("cls", width, width) | linear("cls.output", 1, width, 3.0)
        return weights

    def states(self, tokens: Sequence[int]) -> Tensor:
        """The last layer's vector of each token, [tokens, hidden], as BERT's paper and code define it."""
        weights = self.weights
        x = weights["token_embd.weight"][list(tokens)] + weights["token_types.weight"][0]
        x = self._norm("token_embd_norm", x + weights["position_embd.weight"][: len(tokens)])
        for layer in range(self.layers):
            block = f"blk.{layer}"
            x = self._norm(f"{block}.attn_output_norm", x + self._attention(block, x))
            up = self._linear(f"{block}.ffn_up", x)
            gelu = up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) / 2
            x = self._norm(f"{block}.layer_output_norm", x + self._linear(f"{block}.ffn_down", gelu))
        return x

    def vector(self, tokens: Sequence[int], pooling: Pooling) -> Tensor:
        """The text's vector, of length 1."""
        states = self.states(tokens)
        pooled = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[pooling]
        return pooled / np.linalg.norm(pooled)

    def score(self, tokens: Sequence[int]) -> float:
        """The score that a ranking head computes from the first token's vector."""
        return float(self._linear("cls.output", np.tanh(self._linear("cls", self.states(tokens)[:1]))).item())

    def _attention(self, block: str, x: Tensor) -> Tensor:
        size = self.hidden // self.heads
        q, k, v = (
            self._linear(f"{block}.attn_{name}", x).reshape(len(x), self.heads, size).swapaxes(0, 1) for name in "qkv"
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(size)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ v
        return self._linear(f"{block}.attn_output", mixed.swapaxes(0, 1).reshape(len(x), self.hidden))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + NORM_EPS)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
