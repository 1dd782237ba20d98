"""What a load command names: its options, devices and files, found and checked before anything is loaded."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from exo.worker.protocol.commands import Load
from exo.worker.protocol.cores import physical_cores
from exo.worker.protocol.validation import describe
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.gguf import GgufHeader
from exo.worker.runner_cuda.loading.adapters import Adapter, find_adapters
from exo.worker.runner_cuda.loading.devices import GPU_BACKENDS, Gpu
from exo.worker.runner_cuda.loading.gguf_check import check_header, check_projector, read_headers
from exo.worker.runner_cuda.loading.heads import with_head
from exo.worker.runner_cuda.loading.kv_layout import with_layout
from exo.worker.runner_cuda.loading.options import CPU, CudaOptions, DraftOptions, find_model, find_projector
from exo.worker.runner_cuda.loading.peers import all_gpus
from exo.worker.runner_cuda.loading.placement import check_architecture, chosen


@dataclass(frozen=True, slots=True)
class LoadInputs:
    """The parts of a load command."""

    options: CudaOptions
    present: tuple[Gpu, ...]
    devices: tuple[Gpu, ...]
    """The GPUs in ``present`` that the model card allows; none for a model that stays on the CPU."""
    path: Path
    headers: Sequence[GgufHeader]
    """The headers of the parts of the model's file."""
    adapters: Sequence[Adapter]


def read_inputs(command: Load) -> LoadInputs:
    """Raises LoadError for a missing or broken file and for wrong settings."""
    options = read_options(command)
    present = all_gpus(command)
    devices = chosen(options, command.backend, present)
    path = find_model(options, command.model_id, command.directories)
    check_header(path)
    headers = read_headers(path)
    check_architecture(options, headers[0])
    with_layout(options, headers[0])
    options = with_head(options, headers)
    return LoadInputs(options, present, devices, path, headers, find_adapters(command, options, headers))


def read_options(command: Load) -> CudaOptions:
    """Validates the card's table and adapts it to the backend. Raises LoadError with the key at fault."""
    try:
        options = CudaOptions.model_validate(command.table)
    except ValidationError as error:
        raise LoadError("model_misconfigured", f"model card, [cuda] {describe(error)[1]}") from error
    updates: dict[str, object] = {"threads": options.threads or physical_cores()}
    if command.backend == "LlamaCppCpu" and not command.peers:
        updates["n_gpu_layers"] = 0
    elif command.backend not in (*GPU_BACKENDS, "LlamaCppCpu"):
        raise LoadError("model_load_failed", f"the llama.cpp runner does not serve the backend {command.backend!r}")
    elif not all_gpus(command):
        missing = f"llama.cpp finds no {GPU_BACKENDS[command.backend]} device here"
        raise LoadError("model_load_failed", f"{command.backend} was requested, but {missing}")
    elif options.devices == (CPU,):
        updates["n_gpu_layers"] = 0
    return options.model_copy(update=updates)


def projector_file(options: CudaOptions, model: Path) -> Path | None:
    """Finds the projector beside the model's file and checks its header; None without one. Raises LoadError."""
    path = find_projector(options, model)
    if path is not None:
        check_projector(path)
    return path


def draft_file(command: Load, options: CudaOptions) -> Path | None:
    """Finds the draft model's file and checks its header; None without a draft model. Raises LoadError with the key."""
    draft = options.draft
    if draft is None or options.speculation == "off":
        return None
    with about_draft(draft):
        path = find_model(draft, draft.repo or command.model_id, command.directories)
        check_header(path)
    return path


def draft_options(options: CudaOptions, draft: DraftOptions) -> CudaOptions:
    """Returns a draft model's options: those of the model, but on one device, because the drafts are waited for."""
    alone = {"split_mode": "none", "tensor_split": None, "backend_sampling": "off", "cache_reuse": None, "cpu_moe": 0}
    return options.model_copy(update={"n_gpu_layers": draft.n_gpu_layers, "lora": (), **alone})


@contextmanager
def about_draft(draft: DraftOptions) -> Generator[None]:
    """Attributes a LoadError in its body to the draft model's key in the card."""
    try:
        yield
    except LoadError as error:
        key = "file" if draft.path is None else "path"
        raise LoadError(error.code, f"model card, [cuda.draft] {key}: {error}") from error
