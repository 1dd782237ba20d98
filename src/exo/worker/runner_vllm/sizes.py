"""Reads the sizes of a model and its KV cache from its folder's config.json."""

from exo.worker.runner_common.memory_plan import USABLE
from exo.worker.runner_common.model_files.folder_config import Json, language_config
from exo.worker.runner_vllm.options import VllmOptions

_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
_SPARE_BLOCKS = 2
"""vLLM keeps one block for itself."""
_LARGEST_BLOCK = 64


def number(config: Json, key: str, default: int) -> int:
    """Returns an integer setting of the language model, or ``default`` without one."""
    value = language_config(config).get(key)
    return value if isinstance(value, int) else default


def trained_context(config: Json) -> int:
    """Returns the trained context length, in tokens."""
    return number(config, "max_position_embeddings", USABLE)


def layer_count(config: Json) -> int:
    """Returns the number of layers of the language model."""
    return number(config, "num_hidden_layers", 1)


def computed_in(config: Json, options: VllmOptions) -> str:
    """Returns the type of computed elements by vLLM's rules: the card's, or else the stored one, but not float32."""
    stored = language_config(config).get("dtype", language_config(config).get("torch_dtype"))
    return options.dtype or (stored if isinstance(stored, str) and stored == "float16" else "bfloat16")


def bytes_of_token(config: Json, options: VllmOptions) -> int:
    """Returns the bytes of one token's keys and values in all layers. Linear and latent attention take less."""
    heads = number(config, "num_attention_heads", 1)
    size = number(config, "head_dim", number(config, "hidden_size", 1) // max(1, heads))
    elements = 2 * layer_count(config) * number(config, "num_key_value_heads", heads) * size
    return elements * _WIDTHS[computed_in(config, options)]


def cache_bytes(config: Json, options: VllmOptions, n_ctx: int) -> int:
    """Returns the bytes of the KV cache in one process: its share of the whole contexts."""
    blocks = (options.contexts or options.slots) * -(-n_ctx // _LARGEST_BLOCK) + _SPARE_BLOCKS
    return -(-blocks * _LARGEST_BLOCK * bytes_of_token(config, options) // options.processes)
