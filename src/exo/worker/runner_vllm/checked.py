"""Checks everything about a ``Load`` that can be checked before vLLM is imported."""

from dataclasses import dataclass

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.adapter_folder import AdapterFolder, find_adapters
from exo.worker.runner_common.model_files.model_folder import HfFolder, find_folder, read_folder
from exo.worker.runner_vllm.limits import check_limits, divided
from exo.worker.runner_vllm.options import VllmOptions, read_options
from exo.worker.runner_vllm.probe import nvidia_devices, on_cpu
from exo.worker.runner_vllm.purpose import Purpose, find_purpose

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_LORA_RANKS = (0, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM accepts, and 0."""


@dataclass(frozen=True, slots=True)
class VllmChecked:
    """A ``Load`` that may succeed."""

    options: VllmOptions
    folder: HfFolder
    adapters: list[AdapterFolder]
    purpose: Purpose
    processors: bool
    """Whether this build of vLLM computes on the CPU."""
    peers: tuple[str, ...] = ()
    """The names of the other hosts that have a share of the model."""

    @property
    def on_each(self) -> int:
        """The number of processes that compute on each host."""
        return self.options.processes // (1 + len(self.peers))

    @property
    def lora_slots(self) -> int:
        """The adapters that vLLM makes room for.

        On a CPU, vLLM 0.32 computes rows without an adapter with the last one if other rows have any. It stays empty.
        """
        return len(self.adapters) + self.processors

    @property
    def lora_rank(self) -> int:
        """The rank for which vLLM makes room in every matrix for each adapter; 0 without adapters."""
        most = max((each.rank for each in self.adapters), default=0)
        return next(rank for rank in _LORA_RANKS if rank >= most)


def check(command: Load) -> VllmChecked:
    """Raises LoadError for a missing or broken folder, and for settings that are wrong or impossible here."""
    options = read_options(command.table)
    folder, processors = read_folder(find_folder(options, command.model_id, command.directories)), on_cpu()
    options = divided(options, hosts := 1 + len(command.peers), processors=processors)
    check_limits(options, folder.config, processors=processors, devices=hosts * len(nvidia_devices()))
    adapters = find_adapters(options.lora, command.model_id, command.directories, folder, "vllm")
    purpose = find_purpose(command, options, folder.path, folder.config, processors=processors)
    if options.pictures:
        _check_sight(folder, purpose)
    return VllmChecked(options, folder, adapters, purpose, processors, tuple(each.name for each in command.peers))


def _check_sight(folder: HfFolder, purpose: Purpose) -> None:
    """Raises LoadError for a model that cannot take pictures."""
    reason = ""
    if purpose.pooling is not None:
        reason = "a model for embeddings takes none"
    elif not any((folder.path / name).is_file() for name in _PROCESSORS):
        reason = f"{folder.path} has none of {', '.join(_PROCESSORS)}"
    if reason:
        raise LoadError("model_misconfigured", f"model card, [vllm] pictures: {reason}")
