"""Whether a model's head for multi-token prediction (MTP, "nextn") is used.

A head is one more layer. From the state of a token and the token that follows, it guesses the one after that.
"""

from collections.abc import Sequence

from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_cuda.loading.options import CudaOptions

_ARCHITECTURES = frozenset({"bailingmoe3", "cohere2moe", "glm4moe", "hy_v3", "nemotron_h_moe", "qwen35", "qwen35moe"})
"""Architectures with one head, whose cache is plain (``LLM_GRAPH_TYPE_DECODER_MTP`` in llama.cpp 0.5.0-dev). The others
have several heads, a cache with an index, or a head that needs tensors which not every file has."""


def with_head(options: CudaOptions, headers: Sequence[GgufHeader]) -> CudaOptions:
    """Returns the options with the default of ``speculate`` for the model in files with these headers.

    With ``exact``, a row rounds alike beside others, so guesses cost no difference in the output.
    """
    if options.exact and options.speculate is None and options.draft is None and _in_file(headers):
        return options.model_copy(update={"speculate": "auto"})
    return options


def uses_head(options: CudaOptions, headers: Sequence[GgufHeader]) -> bool:
    """Whether the model's head makes guesses, so that it is loaded."""
    can = options.draft is None and options.split_mode != "tensor"
    return can and options.speculation != "off" and _in_file(headers)


def _in_file(headers: Sequence[GgufHeader]) -> bool:
    arch = headers[0].text("general.architecture")
    if arch not in _ARCHITECTURES or headers[0].integer(f"{arch}.nextn_predict_layers", 0) != 1:
        return False
    layer = headers[0].integer(f"{arch}.block_count", 1) - 1
    return any(tensor.name == f"blk.{layer}.nextn.eh_proj.weight" for each in headers for tensor in each.tensors)
