"""The ways to load a model and the memory of each, from its file's header and the model card. Loads no weights."""

from collections.abc import Sequence
from dataclasses import replace

from exo.worker.protocol.commands import Estimate, Load
from exo.worker.protocol.events import Estimated
from exo.worker.runner_common.memory_plan import (
    LONG,
    Open,
    Part,
    Plan,
    completed,
    default_longest,
    estimated,
    most_cache_in_ram,
)
from exo.worker.runner_common.model_files.gguf import GgufHeader, quality_notes
from exo.worker.runner_cuda.loading.gguf_check import read_headers
from exo.worker.runner_cuda.loading.gguf_sizes import GgufSizes, cache_bytes
from exo.worker.runner_cuda.loading.inputs import LoadInputs, draft_file, draft_options, projector_file, read_inputs
from exo.worker.runner_cuda.loading.kv_layout import pool_obstacle
from exo.worker.runner_cuda.loading.options import AUTO, SHORTEST_CONTEXT, CudaOptions
from exo.worker.runner_cuda.loading.peers import all_gpus
from exo.worker.runner_cuda.loading.placement import elsewhere, placements, tensor_splits
from exo.worker.runner_cuda.loading.projector_memory import projector_parts

_SMALLER_CACHES = ("q8_0", "q4_0")


def estimate(command: Estimate) -> Estimated:
    """Raises LoadError as loading would, for a missing or broken file or wrong settings."""
    load = command.load
    inputs = read_inputs(load)
    poolable = pool_obstacle(inputs.options, inputs.headers[0]) is None
    draft, projector = _draft(load, inputs.options), projector_file(inputs.options, inputs.path)
    seeing = None if projector is None else read_headers(projector)[0]
    found = plans(load, inputs, draft, seeing, poolable=poolable)
    return found.model_copy(update={"notes": quality_notes(inputs.headers[0].text)})


def with_choice(command: Load) -> Load:
    """Returns the command with values for the settings that decide most of the memory, if its table leaves them open.

    A server that counts memory has put them there. Raises LoadError as loading would.
    """
    if all(isinstance(command.table.get(key), int) for key in ("n_ctx", "slots")):
        return command
    found = estimate(Estimate(load=command))
    free = {each.name: each.memory()[0] for each in all_gpus(command)}
    return completed(command, found, free)


def plans(
    load: Load, inputs: LoadInputs, draft: GgufSizes | None, projector: GgufHeader | None = None, *, poolable: bool
) -> Estimated:
    """Returns the ways to load a model, with the memory of each. Pure, apart from the devices' memory.

    ``projector`` is the header of its projector, if it has one. ``poolable``: the slots can share a pool.
    """
    options, devices, table = inputs.options, inputs.devices, load.table
    sizes = GgufSizes.of(inputs.headers, options, [each.header for each in inputs.adapters])
    model = replace(sizes, copies=any(each.copies_weights for each in devices))
    left = _open(load, inputs, model, poolable=poolable)
    wanted = left.layers if options.n_gpu_layers < 0 else min(left.layers, options.n_gpu_layers)
    small = table.get("cache_type_k") == AUTO
    splits = tensor_splits(options, devices)
    plan = Plan(
        n_ctx=options.n_ctx or left.lengths[0],
        slots=options.slots,
        pool=options.kv == "pool",
        n_gpu_layers=wanted if inputs.present else None,
        cpu_moe=options.cpu_moe,
        cache_type=options.cache_type_k if small else None,
        prefix_cache_bytes=options.prefix_caches[-1],
        projector_on_gpu=options.mmproj_offload is not False,
        devices=tuple(each.name for each in devices),
        tensor_split=splits[-1] if splits else options.tensor_split,
    )

    remote = [each.name for each in inputs.present if each.remote]

    def size(plan: Plan) -> list[Part]:
        parts = [*model.size(plan), *(draft.beside(plan) if draft is not None else ())]
        return parts if projector is None else [*parts, *projector_parts(projector, options, plan, remote)]

    return estimated(plan, left, size, _smaller_caches(options), model.layout)


def _open(load: Load, inputs: LoadInputs, model: GgufSizes, *, poolable: bool) -> Open:
    options, devices, table = inputs.options, inputs.devices, load.table
    n_ctx, slots = table.get("n_ctx") in (None, AUTO), table.get("slots") is None and options.cache_reuse is None
    longest, because = default_longest(load.tasks, in_ram=not devices) if table.get("n_ctx") is None else (None, "")
    by_tensor = options.split_mode == "tensor"
    bounded = not devices and (n_ctx or slots) and table.get("n_ctx") != AUTO
    ways = placements(options, devices, stated=table.get("devices") is not None or table.get("split_mode") is not None)
    return Open(
        n_ctx=n_ctx,
        slots=slots and options.kv != "pool",
        pool=poolable and options.kv == AUTO and options.slots > 1 and (n_ctx or slots),
        n_gpu_layers=bool(devices) and table.get("n_gpu_layers") in (None, AUTO),
        projector=bool(devices) and options.mmproj is not None and options.mmproj_offload is None,
        cpu_moe=bool(devices and model.experts) and table.get("cpu_moe") in (None, AUTO) and not by_tensor,
        experts=() if by_tensor else model.experts,
        small_cache=_SMALLER_CACHES[0] if table.get("cache_type_k") == AUTO else None,
        trained=max(model.trained, SHORTEST_CONTEXT),
        longest=longest,
        longest_because=because,
        layers=len(model.layers) + 1,
        placements=ways,
        balanced=None if by_tensor or options.tensor_split is not None else model.balanced,
        longest_divided=LONG if table.get("n_ctx") is None else None,
        prefix_caches=() if options.prefix_cache_bytes is not None else options.prefix_caches,
        most_cache=most_cache_in_ram(model.weights) if bounded else None,
        devices=() if len(ways) > 1 else elsewhere(options, devices, inputs.present),
    )


def _draft(load: Load, options: CudaOptions) -> GgufSizes | None:
    path = draft_file(load, options)
    if path is None or options.draft is None:
        return None
    return GgufSizes.of(read_headers(path), draft_options(options, options.draft))


def _smaller_caches(options: CudaOptions) -> Sequence[str]:
    """Returns the smaller types to suggest. Quantised values need flash attention, and exclude split mode "tensor"."""
    if options.flash_attn == "off" or options.split_mode == "tensor":
        return ()
    largest = max(cache_bytes(options.cache_type_k, 1024), cache_bytes(options.cache_type_v, 1024))
    return [kind for kind in _SMALLER_CACHES if cache_bytes(kind, 1024) < largest]
