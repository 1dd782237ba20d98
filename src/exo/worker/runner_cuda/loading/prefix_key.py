"""Opens the disk tier of the prefix cache, for one model with one set of settings."""

from pathlib import Path

from pydantic import JsonValue

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.model_files.gguf import split_parts
from exo.worker.runner_cuda.bindings import Context, engine_version
from exo.worker.runner_cuda.loading.file_identity import identity
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions
from exo.worker.runner_cuda.prefix.disk_tier import DiskTier
from exo.worker.runner_cuda.step_time import Pace

_WITHOUT_EFFECT = {
    *("path", "repo", "file", "mmproj", "mmproj_offload", "n_gpu_layers", "n_ctx", "slots", "n_batch", "n_ubatch"),
    *("prefix_cache_bytes", "prefix_disk_bytes", "speculate", "draft", "lora", "backend_sampling", "threads"),
    *("threads_batch", "devices", "split_mode", "tensor_split", "main_gpu", "chat_template", "pooling"),
    *("embedding_ctx", "max_itl_ms"),
}
"""The options that change nothing in a state but its rounding. Every other one is part of the key, also one that is
added later, such as a setting of the positions. Each state is kept with the adapter that it was computed with."""


def open_disk_tier(
    command: Load, options: CudaOptions, path: Path, model: Model, context: Context, pace: Pace
) -> DiskTier | None:
    """Returns None if prefixes are not kept on disk."""
    if not (command.prefixes and options.prefix_disk_bytes != 0 and options.prefix_caches[0] and context.generates):
        return None
    trained = model.metadata("{arch}.rope.scaling.original_context_length") or model.n_ctx_train
    key: dict[str, JsonValue] = {
        "files": [list(identity(part)) for part in split_parts(path)],
        "engine": engine_version(),
        "backend": command.backend,
        # Some models rotate positions differently if the context is longer than what they were first trained for.
        "long": context.n_ctx > int(trained),
        # Recurrent states that can be rolled back may have another layout.
        "rollback": 0 if model.can_cut else context.rollback,
        **options.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
    }
    limit = options.prefix_disk_bytes
    return DiskTier(Path(command.prefixes), command.model_id, key, limit, pace.prompt_seconds)
