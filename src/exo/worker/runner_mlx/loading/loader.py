"""Loads a model: from a ``Load`` command to warm weights, KV cache and tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from exo.worker.protocol.commands import Load
from exo.worker.protocol.events import Capabilities, Status
from exo.worker.runner_common.hf_embedding import choose_pooling, dense_layers
from exo.worker.runner_common.hf_tokenizer import TransformersTokenizer
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.memory_plan import LONGEST_TEXT, USABLE
from exo.worker.runner_common.model_files.adapter_folder import AdapterFolder, find_adapters
from exo.worker.runner_common.model_files.folder_config import Json
from exo.worker.runner_common.model_files.folder_templates import TOOL_USE, usual
from exo.worker.runner_common.model_files.model_folder import HfFolder, find_folder, read_folder, tell_ignored
from exo.worker.runner_mlx.embedding import MlxEmbedder
from exo.worker.runner_mlx.kv_cache import KVCache
from exo.worker.runner_mlx.loading.config_keys import check_keys, wanted_positions
from exo.worker.runner_mlx.loading.devices import Backend, device, use_backend
from exo.worker.runner_mlx.loading.options import MlxOptions, read_options
from exo.worker.runner_mlx.loading.positions import WantedPositions
from exo.worker.runner_mlx.model import (
    BROKEN_MODEL,
    ONE_SEQUENCE,
    MlxModel,
    keep_weights_in_memory,
    load_error,
    network_class,
    open_tokenizer,
    wait_for,
)
from exo.worker.runner_mlx.probe import ENGINE, engine_version
from exo.worker.runner_mlx.ranks.ranks import Ranks
from exo.worker.runner_mlx.ranks.sharding import RankPart, Sharding, asked_for, refusal

CPU_CHUNK, GPU_CHUNK = 32, 512
"""Prompt tokens per step. Larger chunks are no faster on a CPU, and a cancelled one must end soon."""


@dataclass(frozen=True, slots=True)
class MlxChecked:
    """A ``Load`` that may succeed."""

    options: MlxOptions
    backend: Backend
    folder: HfFolder
    adapters: list[AdapterFolder]
    trained: int
    """The trained context length in tokens, or less if mlx-lm computes only a shorter context correctly."""
    n_ctx: int
    sharding: Sharding | None
    positions: WantedPositions | None
    peers: tuple[str, ...] = ()
    """The names of the hosts that have the other processes."""


@dataclass(frozen=True, slots=True)
class MlxLoaded:
    """A model ready to generate.

    ``chunk`` is the prompt tokens per step. ``settings`` are those that rounding depends on. ``ranks`` are the other
    processes of a divided model.
    """

    model: MlxModel
    cache: KVCache
    embedder: MlxEmbedder
    tokenizer: TransformersTokenizer
    capabilities: Capabilities
    chunk: int
    settings: dict[str, str]
    ranks: Ranks | None


def check(command: Load) -> MlxChecked:
    """Checks everything that can be checked before reading weights, and selects the backend. Raises LoadError."""
    options = read_options(command.table)
    backend = use_backend(command.backend)
    folder = read_folder(find_folder(options, command.model_id, command.directories))
    config = folder.config
    if config["model_type"] in ONE_SEQUENCE and command.table.get("slots") is None:
        options = options.model_copy(update={"slots": 1})
    elif config["model_type"] in ONE_SEQUENCE and options.slots > 1:
        message = f"mlx-lm computes {config['model_type']} only for one sequence at a time: [mlx] needs slots = 1"
        raise LoadError("model_load_failed", message)
    network = network_class(config)
    read = check_keys(folder, network, options.ignored_settings)
    window = read.window
    if window is not None and (options.n_ctx or 0) > window:
        reason = "lets every layer attend to the whole context, which would be another model"
        raise LoadError(
            "model_load_failed",
            f"{folder.path / 'config.json'} has sliding_window = {window}, and mlx-lm {reason}: "
            f"[mlx] n_ctx may be at most {window}, or ignored_settings = ['sliding_window']",
        )
    trained = trained_context(config) if window is None else min(trained_context(config), window)
    n_ctx = options.n_ctx or min(trained, USABLE)
    peers = tuple(each.name for each in command.peers)
    sharding = asked_for(options, config, backend, 1 + len(peers))
    if sharding is not None and sharding.kind == "tensor" and not hasattr(network, "shard"):
        reason = f"mlx-lm cannot divide the layers of {config['model_type']}; pipeline_parallel_size keeps layers whole"
        raise refusal(sharding.kind, sharding.size, reason)
    positions = wanted_positions(folder, read.unread, n_ctx, options.ignored_settings)
    adapters = find_adapters(options.lora, command.model_id, command.directories, folder, "mlx")
    return MlxChecked(options, backend, folder, adapters, trained, n_ctx, sharding, positions, peers)


def open_model(
    checked: MlxChecked, on_layer: Callable[[int, int], None], part: RankPart | None
) -> tuple[MlxModel, KVCache]:
    """Loads the network, or this rank's part of it, and creates the slots' KV cache. Raises LoadError."""
    keep_weights_in_memory()
    dtype = computed_in(checked.options, checked.folder.config, checked.backend)
    model = MlxModel(checked.folder, checked.positions, dtype, on_layer, part)
    model.add_adapters(checked.adapters)
    return model, KVCache(model.windows, checked.options.slots, checked.n_ctx)


def load(command: Load, report: Callable[[Status], None]) -> MlxLoaded:
    """Loads and warms up a model, and reports progress. Call it in the thread that computes. Raises LoadError."""
    checked = check(command)
    options, backend, folder = checked.options, checked.backend, checked.folder.path
    report(Status(state="Loading"))
    tell_ignored(checked.folder)

    def on_layer(done: int, total: int) -> None:
        report(Status(state="Loading", layers_loaded=done, total_layers=total))

    ranks = Ranks(command, checked.sharding, backend) if checked.sharding is not None else None
    model, cache = open_model(checked, on_layer, ranks.part if ranks is not None else None)
    report(Status(state="Loaded", layers_loaded=model.n_layers, total_layers=model.n_layers))
    if ranks is not None:
        ranks.wait_until_loaded()
    report(Status(state="WarmingUp"))
    n_vocab = _warm_up(model, cache, folder, options.slots, ranks)
    found = open_tokenizer(checked.folder, model.eos_token_ids)
    tokenizer = TransformersTokenizer(found, n_vocab, found.eos_token_ids)
    chunk = options.prefill_chunk or (CPU_CHUNK if backend == "MlxCpu" else GPU_CHUNK)
    longest = options.embedding_ctx or min(checked.n_ctx, LONGEST_TEXT)
    embedder = MlxEmbedder(model, choose_pooling(options.pooling, folder, "mlx"), longest, chunk)
    capabilities = Capabilities(
        engine=ENGINE,
        engine_version=engine_version(),
        backend=backend,
        devices=_devices(backend, checked.sharding, checked.peers),
        context_length=checked.n_ctx,
        slots=options.slots,
        vocabulary=tokenizer.n_vocab,
        grammar=True,
        logprobs=True,
        embeddings=model.has_states() and not dense_layers(folder),
        adapters=tuple(each.name for each in checked.adapters),
        model_bytes=model.size_bytes,
        chat_template=options.chat_template or usual(checked.folder.templates),
        notes=checked.folder.notes,
        tool_template=None if options.chat_template else checked.folder.templates.get(TOOL_USE),
        bos_token=tokenizer.bos_text,
        eos_token=tokenizer.eos_text,
        special_tokens=tuple(tokenizer.special),
        special_ids=tuple(tokenizer.special.values()),
        fim=tokenizer.fim,
    )
    settings = {
        "quantisation": _quantisation(checked.folder.config),
        "computed in": str(cache.arrays()[0].dtype).removeprefix("mlx.core."),
        "prompt chunk": str(chunk),
        "processes": "1" if checked.sharding is None else checked.sharding.describe(),
    }
    return MlxLoaded(model, cache, embedder, tokenizer, capabilities, chunk, settings, ranks)


def _devices(backend: Backend, sharding: Sharding | None, peers: Sequence[str]) -> tuple[str, ...]:
    """Returns a device's description for each rank. Ranks on other hosts have devices like this host's first one."""

    def name(index: int) -> str:
        return "CPU" if backend == "MlxCpu" else device(backend, index).name

    if sharding is None:
        return (name(0),)
    kind, size = sharding.kind, sharding.size
    own = 0 if peers or backend != "MlxCuda" else size
    hosts = ("", *(f"{each}/" for each in peers)) if peers else ("",) * size
    return tuple(f"{host}{name(rank if own else 0)} (rank {rank} of {size}, {kind})" for rank, host in enumerate(hosts))


def computed_in(options: MlxOptions, config: Json, backend: Backend) -> str | None:
    """Returns the type that the model is converted to; None keeps the stored one.

    Quantised weights on a CPU need float32: MLX's x86 ``quantized_matmul`` sums in the type of the activations, and in
    bfloat16 it is 4.6 % off on average.
    """
    quantised = "quantization" in config or "quantization_config" in config
    return options.dtype or ("float32" if quantised and backend == "MlxCpu" else None)


def _quantisation(config: Json) -> str:
    found = config.get("quantization") or config.get("quantization_config")
    if not isinstance(found, dict):
        return "none"
    return ", ".join(f"{key} {value}" for key, value in found.items() if isinstance(value, int | str))


def trained_context(config: Json) -> int:
    """Returns the trained context length in tokens. Models with a vision part nest the language model's settings."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        length = place.get("max_position_embeddings")
        if isinstance(length, int):
            return length
    return USABLE


def _warm_up(model: MlxModel, cache: KVCache, folder: Path, n_slots: int, ranks: Ranks | None) -> int:
    """Computes a prompt chunk and steps of one and of two rows, so that kernels are built before the first request.

    Returns the size of the vocabulary, which is the width of the logits.
    """
    rows = min(2, n_slots)
    try:
        model.forward(mx.array([[0, 0]]), cache, [0], [0], whole=False)
        wait_for(cache.arrays())
        logits = model.forward(mx.array([[0]]), cache, [0], [2])
        wait_for(logits)
        wait_for(model.forward(mx.zeros((rows, 1), mx.int32), cache, [*range(rows)], [3, 0][:rows]))
    except BROKEN_MODEL as error:
        if ranks is not None:
            ranks.blame()
        raise load_error(f"the model in {folder} does not compute", error) from error
    return logits.shape[2]
