"""Whether the slots of a model can share one pool of cells (``kv`` in ``[cuda]``)."""

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_cuda.loading.layer_cache import layer_caches
from exo.worker.runner_cuda.loading.options import AUTO, CudaOptions

_SPARSE_ATTENTION = frozenset({
    "deepseek32", "deepseek4", "dflash", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "minimax-m3", "qwen4exp",
})  # fmt: skip
"""Architectures whose caches have an index or compressed cells, which llama.cpp keeps for each sequence, or which it
does not use with a unified cache (``create_memory``)."""


def pool_obstacle(options: CudaOptions, header: GgufHeader) -> str | None:
    """Returns why a model's slots cannot share one pool; None if they can. ``header`` is that of the model's file."""
    if options.exact:
        return "exact needs cells that no other sequence's are among"
    if options.draft is not None and options.speculation != "off":
        return "a draft model has a part of its cache for each slot"
    if options.cache_reuse is not None:
        return "cache_reuse needs the only slot"
    arch = header.text("general.architecture")
    if options.mmproj is not None and f"{arch}.rope.dimension_sections" in header.fields:
        return "tokens of a picture share positions in this model, and a pool counts its cells by positions"
    if arch in _SPARSE_ATTENTION:
        return f'the sparse attention of "{arch}" has an index for each sequence'
    layers = layer_caches(header, equal_values=False)
    if any(layer.window is not None for layer in layers):
        return "layers with a sliding window overwrite cells, which must be the sequence's own"
    if any(layer.state for layer in layers):
        return "recurrent layers have a state for each slot"
    if not any(layer.keys for layer in layers):
        return "it is an encoder, which has no KV cache"
    return None


def with_layout(options: CudaOptions, header: GgufHeader) -> CudaOptions:
    """Returns the options with the layout that "auto" stands for where no plan has chosen one. Raises LoadError."""
    if options.kv == "pool" and (obstacle := pool_obstacle(options, header)) is not None:
        raise LoadError("model_misconfigured", f'model card, [cuda] kv: "pool" is not possible: {obstacle}')
    return options.model_copy(update={"kv": "split"}) if options.kv == AUTO else options
