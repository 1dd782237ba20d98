"""Loads a model: from a ``Load`` command to a warm vLLM engine core and tokenizer."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exo.worker.protocol.commands import Load, SamplingParams
from exo.worker.protocol.cores import physical_cores
from exo.worker.protocol.events import Capabilities, Status
from exo.worker.runner_common.commands import TextJob
from exo.worker.runner_common.hf_tokenizer import TransformersTokenizer
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.model_files.folder_config import Json
from exo.worker.runner_common.model_files.folder_templates import TOOL_USE, usual
from exo.worker.runner_common.model_files.model_folder import end_tokens, presented, read_optional, tell_ignored
from exo.worker.runner_common.part_process import own_address, reserved
from exo.worker.runner_vllm.checked import VllmChecked, check
from exo.worker.runner_vllm.hosts import interface, start_followers
from exo.worker.runner_vllm.limits import quantisation
from exo.worker.runner_vllm.options import load_error
from exo.worker.runner_vllm.probe import BACKEND, ENGINE, engine_version, nvidia_devices
from exo.worker.runner_vllm.purpose import Purpose
from exo.worker.runner_vllm.sequence import Choice, VllmSequence
from exo.worker.runner_vllm.sizes import cache_bytes, layer_count, trained_context
from exo.worker.runner_vllm.switches import set_compute, set_network

if TYPE_CHECKING:
    from exo.worker.runner_vllm.sight import VllmSight
    from exo.worker.runner_vllm.vllm_edge import Core

CPU_BLOCK = 32
"""Tokens of a block of the KV cache on a CPU: the smallest size that vLLM has, because the prefix cache reuses whole
blocks. On a GPU, vLLM chooses the size."""
_MOST_LOGPROBS = -1
"""No limit."""


@dataclass(frozen=True, slots=True)
class VllmLoaded:
    """A loaded model. ``settings`` are those that rounding depends on."""

    core: "Core"
    tokenizer: TransformersTokenizer
    sight: "VllmSight | None"
    capabilities: Capabilities
    settings: dict[str, str]


def load(command: Load, report: Callable[[Status], None]) -> VllmLoaded:
    """Loads and warms up a model, and reports progress. Call it in the thread that computes. Raises LoadError."""
    if command.backend != BACKEND:
        message = f"the backend {command.backend!r} was requested, but this runner serves only {BACKEND}"
        raise LoadError("model_load_failed", message)
    checked = check(command)
    options, config, purpose = checked.options, checked.folder.config, checked.purpose
    layers = layer_count(config)
    report(Status(state="Loading", total_layers=layers))
    tell_ignored(checked.folder)
    generates = purpose.pooling is None
    set_engine_compute(checked)
    with ExitStack() as meanwhile:
        divided = _started_followers(command, meanwhile) if command.peers else {}
        try:
            from exo.worker.runner_vllm.sight import VllmSight
            from exo.worker.runner_vllm.vllm_edge import Core, open_tokenizer
        except (ImportError, OSError, RuntimeError) as error:
            raise load_error("vLLM does not load", error) from error
        view = meanwhile.enter_context(presented(checked.folder, checked.folder.written))
        core = Core.load({**engine_arguments(checked, view), **divided}, purpose.pooling)
        for number, adapter in enumerate(checked.adapters if generates else (), start=1):
            core.add_adapter(adapter.name, number, adapter.path)
        report(Status(state="Loaded", layers_loaded=layers, total_layers=layers))
        report(Status(state="WarmingUp"))
        tokenizer = TransformersTokenizer(open_tokenizer(view), core.n_vocab, _ends(checked.folder.path, config))
        sight = VllmSight(core.config, tokenizer, purpose.chunk) if options.pictures else None
    _warm_up(core, checked.folder.path, purpose)
    capabilities = Capabilities(
        engine=ENGINE,
        engine_version=engine_version(),
        backend=BACKEND,
        devices=_devices(checked),
        context_length=purpose.n_ctx,
        slots=options.slots,
        vocabulary=tokenizer.n_vocab,
        grammar=generates and options.processes == 1,
        logprobs=generates,
        embeddings=not generates,
        vision=sight is not None,
        adapters=tuple(core.adapters),
        model_bytes=sum(tensor.size for tensor in checked.folder.tensors.values()),
        chat_template=options.chat_template or usual(checked.folder.templates),
        notes=checked.folder.notes,
        tool_template=None if options.chat_template else checked.folder.templates.get(TOOL_USE),
        bos_token=tokenizer.bos_text,
        eos_token=tokenizer.eos_text,
        special_tokens=tuple(tokenizer.special),
        special_ids=tuple(tokenizer.special.values()),
        fim=tokenizer.fim,
    )
    used = quantisation(options, config) or "none"
    computed = {"computed in": core.dtype, "prompt chunk": str(purpose.chunk), "quantisation": used}
    return VllmLoaded(core, tokenizer, sight, capabilities, computed)


def _started_followers(command: Load, meanwhile: ExitStack) -> dict[str, object]:
    """Starts the other hosts, and returns the engine's arguments for this one. Raises LoadError.

    ``meanwhile`` keeps the port at which all meet.
    """
    address = own_address(command.peers)
    place = meanwhile.enter_context(reserved(address))
    set_network(address, interface(address))
    return start_followers(command, address, int(place.rpartition(":")[2])).arguments


def _devices(checked: VllmChecked) -> tuple[str, ...]:
    hosts = ("", *(f"{each}/" for each in checked.peers))
    own = ("CPU",) if checked.processors else tuple(each.name for each in nvidia_devices()[: checked.on_each])
    return tuple(f"{host}{name}" for host in hosts for name in own)


def set_engine_compute(checked: VllmChecked) -> None:
    """Sets the environment variables that depend on the model card. Call it before vLLM is imported."""
    threads = checked.options.threads or physical_cores()
    set_compute(threads if checked.processors else None, eager=_eager(checked))


def _eager(checked: VllmChecked) -> bool:
    wanted = checked.options.enforce_eager
    return checked.processors if wanted is None else wanted


def engine_arguments(checked: VllmChecked, view: Path) -> dict[str, object]:
    """Returns the engine's arguments, by vLLM's names, without those of pooling. ``view`` is the model's folder.

    Prompts are cut into chunks of a fixed size, no matter how many rows are being decoded, so that other requests
    change the computation as little as possible.
    """
    options, config, purpose = checked.options, checked.folder.config, checked.purpose
    n_ctx, chunk, generates = purpose.n_ctx, purpose.chunk, purpose.pooling is None
    return {
        "model": str(view),
        **_cache(checked),
        "skip_tokenizer_init": not options.pictures,  # the processor of pictures takes a tokenizer
        "trust_remote_code": False,
        "load_format": "safetensors",
        "dtype": options.dtype or "auto",
        "quantization": options.quantization,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "distributed_executor_backend": "uni" if options.processes == 1 else "mp",
        "max_model_len": n_ctx,
        "hf_overrides": _longer(config, n_ctx),
        "max_num_seqs": options.slots,
        "max_num_batched_tokens": chunk + options.slots,
        "long_prefill_token_threshold": min(chunk, n_ctx) if purpose.divides else 0,
        "enable_chunked_prefill": purpose.divides,
        "enable_prefix_caching": generates,
        "async_scheduling": False,
        "enforce_eager": _eager(checked),
        **_media(checked),
        "generation_config": "vllm",
        "logits_processors": ["exo.worker.runner_vllm.sampler:Chooser"] if generates else [],
        "max_logprobs": _MOST_LOGPROBS,
        "seed": 0,
        **(_adapters(checked) if generates and checked.adapters else {}),
    }


def _media(checked: VllmChecked) -> dict[str, object]:
    """Returns the arguments for media. Without any, vLLM loads no encoders of them.

    ``VllmSight`` hands over one picture at a time, and the engine core caches what the encoder has made of it.
    """
    if checked.options.pictures:
        return {"limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0}, "mm_processor_cache_gb": 0}
    none = {"image": 0, "video": 0, "audio": 0}
    return {"limit_mm_per_prompt": none if "vision_config" in checked.folder.config else {}}


def _adapters(checked: VllmChecked) -> dict[str, object]:
    """Returns the arguments for the model card's adapters, all of which stay in memory."""
    count = checked.lora_slots
    return {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": checked.lora_rank}


def _longer(config: Json, n_ctx: int) -> dict[str, object]:
    """Returns settings that make vLLM's rotary tables long enough for a context beyond the trained one."""
    if n_ctx <= trained_context(config):
        return {}
    longer: dict[str, object] = {"max_position_embeddings": n_ctx}
    return {"text_config": longer} if isinstance(config.get("text_config"), dict) else longer


def _cache(checked: VllmChecked) -> dict[str, object]:
    """Returns arguments for a KV cache with every slot's whole context, unless the card sets a share of each GPU."""
    options = checked.options
    block: dict[str, object] = {"block_size": CPU_BLOCK} if checked.processors else {}
    if options.gpu_memory_utilization is not None and not checked.processors:
        return {**block, "gpu_memory_utilization": options.gpu_memory_utilization}
    return {**block, "kv_cache_memory_bytes": cache_bytes(checked.folder.config, options, checked.purpose.n_ctx)}


def _ends(folder: Path, config: Json) -> Collection[int]:
    """Returns the ids that end generation, from the folder's files. Raises LoadError."""
    found = [config.get("eos_token_id"), read_optional(folder, "generation_config.json").get("eos_token_id")]
    return {token for value in found for token in end_tokens(folder, value)}


def _warm_up(core: "Core", folder: Path, purpose: Purpose) -> None:
    """Computes a prompt and two tokens, or a text, so that lazy initialisation is done. Raises LoadError."""
    from exo.worker.runner_vllm.vllm_edge import BROKEN_MODEL

    name, tokens = "warm-up", [0, 0]
    try:
        if purpose.pooling is None:
            choice = Choice(SamplingParams(seed=0, temperature=1.0), n_prompt=len(tokens))
            core.add(VllmSequence(name, tokens, 4, choice, logprobs=0))
        else:
            core.add_text(TextJob(name, tokens))
        left = 2 if purpose.pooling is None else 1
        while left:
            left -= sum(output.scores is not None or output.vector is not None for output in core.step())
    except BROKEN_MODEL as error:
        raise load_error(f"the model in {folder} does not compute", error) from error
    core.remove(name)
