"""Checks everything about a ``Load`` that can be checked before vLLM is imported."""

from dataclasses import dataclass

from exo.worker.protocol.commands import Load
from exo.worker.runner_common.model_files.model_folder import HfFolder, find_folder, read_folder
from exo.worker.runner_vllm.limits import check_limits, divided
from exo.worker.runner_vllm.options import VllmOptions, read_options
from exo.worker.runner_vllm.probe import nvidia_devices, on_cpu
from exo.worker.runner_vllm.purpose import Purpose, find_purpose


@dataclass(frozen=True, slots=True)
class VllmChecked:
    """A ``Load`` that may succeed."""

    options: VllmOptions
    folder: HfFolder
    purpose: Purpose
    processors: bool
    """Whether this build of vLLM computes on the CPU."""
    peers: tuple[str, ...] = ()
    """The names of the other hosts that have a share of the model."""

    @property
    def on_each(self) -> int:
        """The number of processes that compute on each host."""
        return self.options.processes // (1 + len(self.peers))


def check(command: Load) -> VllmChecked:
    """Raises LoadError for a missing or broken folder, and for settings that are wrong or impossible here."""
    options = read_options(command.table)
    folder, processors = read_folder(find_folder(options, command.model_id, command.directories)), on_cpu()
    options = divided(options, hosts := 1 + len(command.peers), processors=processors)
    check_limits(options, folder.config, processors=processors, devices=hosts * len(nvidia_devices()))
    purpose = find_purpose(command, options, folder.path, folder.config, processors=processors)
    return VllmChecked(options, folder, purpose, processors, tuple(each.name for each in command.peers))
