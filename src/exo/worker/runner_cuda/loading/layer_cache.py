"""The memory that each layer keeps of a sequence, as llama.cpp allocates it: keys and values, or a recurrent state.

The rules are those of llama.cpp 0.5.0-dev (``create_memory``, ``llama_kv_cache``, ``llama_kv_cache_iswa`` and
``llama_memory_recurrent``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from exo.worker.runner_common.memory_plan import cells
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_cuda.loading.window_layers import layer_windows

_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_BOTH = frozenset({"falcon-h1"})
"""Each layer has attention and a recurrent state."""
_BY_HEADS = frozenset({
    "jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "kimi-linear", "kimi-k3",
    "bailingmoe3", "glm5-next",
})  # fmt: skip
"""A layer without KV heads is recurrent."""
_BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
"""Every n-th layer has attention, unless the file says otherwise; the others are recurrent."""
_ROLLS_BACK = frozenset({
    "kimi-k3", "qwen35", "qwen35moe", "qwen4exp", "glm5-next", "nemotron_h", "nemotron_h_moe", "lfm2", "lfm2moe",
    "bailingmoe3",
})  # fmt: skip
"""Recurrent layers that can return to the states before the last tokens (``llm_arch_supports_rs_rollback``)."""
_GEMMA3N_OWN = 20
"""The layers of gemma3n that have keys and values of their own; later ones use those of an earlier layer."""
_RECURRENT_SCALAR = 4
"""Bytes of a number in a recurrent state, which is float32."""


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """The cache of one layer. Keys and values are in elements for each token, the state is in bytes."""

    heads: int = 0
    """The number of KV heads. A device has whole heads."""
    keys: int = 0
    values: int = 0
    state: int = 0
    """Bytes for each sequence in a recurrent layer."""
    window: int | None = None
    """Tokens that the layer looks back; None for the whole context."""

    def n_cells(self, n_ctx: int, n_ubatch: int, n_windows: int = 1) -> int:
        """Returns the tokens that a cache of ``n_ctx`` has room for in this layer.

        A step of ``n_ubatch`` rows is stored before the oldest tokens become free. ``n_windows`` is the number of
        sequences that share the cache.
        """
        if self.window is None:
            return cells(n_ctx)
        return min(cells(n_ctx), cells(n_windows * self.window + n_ubatch))


def layer_caches(header: GgufHeader, *, equal_values: bool, rollback: int = 0, head: bool = False) -> list[CachedLayer]:
    """Reads what each of a model's layers keeps. With ``equal_values``, values take as much in each layer.

    A layer that is a head for multi-token prediction keeps something if ``head`` says that it is used.
    Where the engine can, it keeps the recurrent states before the last ``rollback`` tokens, too.
    Indexes of sparse attention (DeepSeek 3.2 and its relatives) are not counted.
    """
    arch = header.text("general.architecture")

    def number(key: str, default: int = 0) -> int:
        return header.integer(f"{arch}.{key}", default)

    n_layers = number("block_count", 1)
    heads = header.per_layer(f"{arch}.attention.head_count", n_layers, 1)
    kv_heads = header.per_layer(f"{arch}.attention.head_count_kv", n_layers, max(heads))
    n_trunk = n_layers - number("nextn_predict_layers")
    windows = [*layer_windows(header, arch, n_trunk), *[None] * (n_layers - n_trunk)]
    recurrent = _recurrent(header, arch, kv_heads)
    attends = _attends(header, arch, n_trunk, recurrent)
    width = number("embedding_length", 1) // max(1, *heads)
    length, length_of_values = number("attention.key_length", width), number("attention.value_length", width)
    # Compressed keys contain the values.
    compressed = number("attention.key_length_mla") > 0 and number("attention.value_length_mla") > 0
    state = _state(header, arch, heads[0], length) * (1 + rollback if arch in _ROLLS_BACK else 1)
    found = list[CachedLayer]()
    for layer in range(n_layers):
        windowed = windows[layer] is not None
        has_keys = attends[layer] or (head and layer >= n_trunk)
        keys = number("attention.key_length_swa", length) if windowed else length
        values = number("attention.value_length_swa", length_of_values) if windowed else length_of_values
        found.append(
            CachedLayer(
                heads=kv_heads[layer],
                keys=kv_heads[layer] * keys if has_keys else 0,
                values=kv_heads[layer] * values if has_keys and not compressed else 0,
                state=state if recurrent[layer] and layer < n_trunk else 0,
                window=windows[layer],
            )
        )
    return _with_equal_values(found) if equal_values and not compressed else found


def _with_equal_values(caches: Sequence[CachedLayer]) -> list[CachedLayer]:
    """Returns the caches without flash attention, whose values are transposed: each layer has the largest one's."""
    most = max(each.values for each in caches)
    return [CachedLayer(each.heads, each.keys, most if each.keys else 0, each.state, each.window) for each in caches]


def _recurrent(header: GgufHeader, arch: str, kv_heads: Sequence[int]) -> list[bool]:
    """Returns for each layer whether it has a recurrent state."""
    n_layers = len(kv_heads)
    if arch in _RECURRENT or arch in _BOTH:
        return [True] * n_layers
    if arch in _BY_HEADS:
        # A layer of nemotron_h is attention, recurrent or feed-forward.
        wide = header.per_layer(f"{arch}.feed_forward_length", n_layers, 0) if arch.startswith("nemotron") else ()
        return [heads == 0 and not (wide and wide[layer]) for layer, heads in enumerate(kv_heads)]
    if (interval := _BY_INTERVAL.get(arch)) is None:
        return [False] * n_layers
    if (key := f"{arch}.attention.recurrent_layers") in header.fields:
        return [bool(each) for each in header.per_layer(key, n_layers, 0)]
    interval = max(1, header.integer(f"{arch}.full_attention_interval", interval))
    return [(layer + 1) % interval != 0 for layer in range(n_layers)]


def _attends(header: GgufHeader, arch: str, n_trunk: int, recurrent: Sequence[bool]) -> list[bool]:
    """Returns for each layer whether it has keys and values of its own."""
    n_layers = len(recurrent)
    if arch in _RECURRENT or not header.integer(f"{arch}.attention.causal", 1):  # an encoder has no KV cache
        return [False] * n_layers
    n_own = n_trunk
    if arch == "gemma3n":
        n_own = _GEMMA3N_OWN
    elif arch == "gemma4":
        n_own = n_trunk - header.integer(f"{arch}.attention.shared_kv_layers", 0)
    return [layer < n_own and (arch in _BOTH or not recurrent[layer]) for layer in range(n_layers)]


def _state(header: GgufHeader, arch: str, heads: int, length: int) -> int:
    """Returns the bytes of a recurrent layer's state for one sequence. ``length`` is that of a head."""

    def number(key: str, default: int = 0) -> int:
        return header.integer(f"{arch}.{key}", default)

    hidden = number("embedding_length", 1)
    inner, state, kernel = number("ssm.inner_size"), number("ssm.state_size"), number("ssm.conv_kernel")
    if (head := number("wkv.head_size")) > 0:
        shifted, kept = number("token_shift_count", 2) * hidden, hidden * head
    elif (short := number("shortconv.l_cache")) > 0:
        shifted, kept = hidden * (short - 1), 0
    elif (head := number("kda.head_dim")) > 0:
        shifted, kept = 3 * ((kernel or 4) - 1) * heads * head, head * head * heads
    else:
        shifted = max(0, kernel - 1) * (inner + 2 * number("ssm.group_count") * state)
        kept = length * length * heads if arch == "minimax-01" else inner * state
    return _RECURRENT_SCALAR * (shifted + kept)
