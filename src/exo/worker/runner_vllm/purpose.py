"""The purpose that a model is loaded for: generation or embeddings. vLLM supports one of them at a time."""

from dataclasses import dataclass
from pathlib import Path

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.hf_embedding import Pooling, choose_pooling, dense_layers
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.memory_plan import LONGEST_TEXT, USABLE
from exo.worker.runner_common.model_files.folder_config import Json, language_config
from exo.worker.runner_common.model_files.model_folder import file_tensors
from exo.worker.runner_vllm.options import VllmOptions
from exo.worker.runner_vllm.sizes import trained_context

CPU_CHUNK, GPU_CHUNK = 128, 2048
"""Prompt tokens per step. On a CPU a cancelled chunk must end soon."""


@dataclass(frozen=True, slots=True)
class Purpose:
    """``pooling`` is None for generation. Counts are tokens."""

    pooling: Pooling | None
    n_ctx: int
    """The length of a sequence, or of the longest text."""
    chunk: int
    """The most prompt tokens per step."""
    divides: bool
    """Whether a prompt or a text may be computed in several steps."""


def find_purpose(command: Load, options: VllmOptions, folder: Path, config: Json, *, processors: bool) -> Purpose:
    """Returns the purpose by the card's tasks. Raises LoadError for settings that do not fit it."""
    embeds = "TextEmbedding" in command.tasks and "TextGeneration" not in command.tasks
    if options.pooling is not None and not embeds:
        message = "it is only for a card with the task TextEmbedding and without TextGeneration"
        raise LoadError("model_misconfigured", f"model card, [vllm] pooling: {message}")
    pooling = _pooling(options, folder) if embeds else None
    n_ctx = options.max_model_len or min(trained_context(config), LONGEST_TEXT if embeds else USABLE)
    usual = options.max_num_batched_tokens or (CPU_CHUNK if processors else GPU_CHUNK)
    divides = pooling is None or (pooling == "last" and _is_causal(config))
    if not divides and (options.max_num_batched_tokens or n_ctx) < n_ctx:
        reason = f"vLLM computes a text in one step, and the longest text has max_model_len = {n_ctx} tokens"
        raise LoadError("model_misconfigured", f"model card, [vllm] max_num_batched_tokens = {usual}: {reason}")
    return Purpose(pooling, n_ctx, usual if divides else max(usual, n_ctx), divides)


def _pooling(options: VllmOptions, folder: Path) -> Pooling:
    """Returns the pooling. Raises LoadError for a folder without its dense layers, which vLLM would skip silently."""
    for layer in dense_layers(folder):
        for name in ("config.json", "model.safetensors"):
            if not (layer / name).is_file():
                raise LoadError("model_load_failed", f"{layer / name} is missing, which embeddings need")
        file_tensors(layer / "model.safetensors")
    return choose_pooling(options.pooling, folder, "vllm")


def _is_causal(config: Json) -> bool:
    """Whether attention is causal, so that a text may be computed in several steps."""
    names, inner = config.get("architectures"), language_config(config)
    generates = isinstance(names, list) and all(str(name).endswith("ForCausalLM") for name in names)
    return generates and inner.get("is_causal") is not False and not inner.get("use_bidirectional_attention")
