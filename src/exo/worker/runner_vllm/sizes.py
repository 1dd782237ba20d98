"""How large a model and its cache are, from its folder's config.json."""

from exo.worker.runner_common.folder_config import Json, language_config
from exo.worker.runner_vllm.options import VllmOptions

DEFAULT_CONTEXT = 4096
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
_SPARE_BLOCKS = 2
"""vLLM keeps one for itself."""
_LARGEST_BLOCK = 64


def number(config: Json, key: str, default: int) -> int:
    """A whole number of the language model, or ``default`` where there is none."""
    value = language_config(config).get(key)
    return value if isinstance(value, int) else default


def trained_context(config: Json) -> int:
    """Tokens that the model was trained for."""
    return number(config, "max_position_embeddings", DEFAULT_CONTEXT)


def layer_count(config: Json) -> int:
    """Layers of the language model."""
    return number(config, "num_hidden_layers", 1)


def computed_in(config: Json, options: VllmOptions) -> str:
    """As vLLM decides it: what the card says, else what the file holds, float32 as bfloat16."""
    stored = language_config(config).get("dtype", language_config(config).get("torch_dtype"))
    return options.dtype or (stored if isinstance(stored, str) and stored == "float16" else "bfloat16")


def bytes_of_token(config: Json, options: VllmOptions) -> int:
    """Of keys and values, in all layers. Linear and latent attention take less, and this is then more than enough."""
    heads = number(config, "num_attention_heads", 1)
    size = number(config, "head_dim", number(config, "hidden_size", 1) // max(1, heads))
    elements = 2 * layer_count(config) * number(config, "num_key_value_heads", heads) * size
    return elements * _WIDTHS[computed_in(config, options)]


def cache_bytes(config: Json, options: VllmOptions, n_ctx: int) -> int:
    """Of one process of those that share the model: room for its part of every slot's whole context."""
    blocks = options.slots * -(-n_ctx // _LARGEST_BLOCK) + _SPARE_BLOCKS
    return -(-blocks * _LARGEST_BLOCK * bytes_of_token(config, options) // options.processes)
