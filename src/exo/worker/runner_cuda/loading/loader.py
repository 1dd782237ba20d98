"""Loads a model: from a ``Load`` command to a warm context, scheduler and tokenizer."""

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from exo.worker.protocol.commands import Load
from exo.worker.protocol.cores import physical_cores, usable_cpus
from exo.worker.protocol.events import Capabilities, Status
from exo.worker.protocol.validation import describe
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.memory_plan import USABLE
from exo.worker.runner_common.model_files.gguf import quality_notes
from exo.worker.runner_cuda.adapter_key import Scaled, adapter_key
from exo.worker.runner_cuda.bindings import Context, Model, Rows, engine_version
from exo.worker.runner_cuda.cell_pool import IDLE_STEPS_ON_GPU, CellPool
from exo.worker.runner_cuda.embedding import RANKING_HEADS, Embedder
from exo.worker.runner_cuda.embedding_input import EmbeddingInput
from exo.worker.runner_cuda.loading.adapters import find_adapters
from exo.worker.runner_cuda.loading.devices import ENGINE, GPU_BACKENDS, Gpu
from exo.worker.runner_cuda.loading.exact import check_exact, use_one_kernel
from exo.worker.runner_cuda.loading.gguf_check import check_header, check_projector, read_headers
from exo.worker.runner_cuda.loading.heads import uses_head, with_head
from exo.worker.runner_cuda.loading.kv_layout import with_layout
from exo.worker.runner_cuda.loading.llama_log import Log
from exo.worker.runner_cuda.loading.options import CPU, CudaOptions, DraftOptions, chunks, find_model, find_projector
from exo.worker.runner_cuda.loading.peers import all_gpus
from exo.worker.runner_cuda.loading.placement import check_architecture, chosen
from exo.worker.runner_cuda.loading.prefix_key import open_disk_tier
from exo.worker.runner_cuda.loading.threads import Threads
from exo.worker.runner_cuda.prefix.cache import PrefixCache
from exo.worker.runner_cuda.prefix.moved_cells import MovedCells
from exo.worker.runner_cuda.prompt_cuts import SCORED_ROWS
from exo.worker.runner_cuda.sampling.device_chains import Chains
from exo.worker.runner_cuda.sampling.device_sampling import BackendSampling, backend_sampling
from exo.worker.runner_cuda.scheduler import Scheduler
from exo.worker.runner_cuda.speculation.head_context import HeadContext, keep_states
from exo.worker.runner_cuda.speculation.head_drafter import WAITING, HeadDrafter
from exo.worker.runner_cuda.speculation.model_drafter import LITTLE, DraftModel, check_vocabulary
from exo.worker.runner_cuda.speculation.ngram_drafter import LONGEST
from exo.worker.runner_cuda.speculation.speculation import Speculation
from exo.worker.runner_cuda.step_time import Pace
from exo.worker.runner_cuda.tokenizer import GgufTokenizer
from exo.worker.runner_cuda.vision.projector import Projector
from exo.worker.runner_cuda.vision.sight import Sight

CPU_ENOUGH = 32
"""On a CPU, a prefill step with this many tokens takes no further prompt, so that the first one begins its output
sooner: larger steps are hardly faster per token. On a GPU they are."""
CPU_MAX_ITL_MS, GPU_MAX_ITL_MS = 260, 100


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to generate. ``chunk`` is the most tokens of one prompt in a step."""

    model: Model
    context: Context
    embedder: Embedder
    tokenizer: GgufTokenizer
    embedding_input: EmbeddingInput
    capabilities: Capabilities
    scheduler: Scheduler
    prefixes: PrefixCache
    chunk: int
    draft: DraftModel | HeadDrafter | None
    sampling: BackendSampling
    threads: Threads
    sight: Sight | None
    """None if the model takes no pictures."""
    adapters: dict[str, Scaled]
    """The model card's adapters, by name."""

    def free(self) -> None:
        """Frees the contexts first: they borrow from the model and from the sampler chains."""
        if self.sight is not None:
            self.sight.close()
        if self.draft is not None:
            self.draft.free()
        self.embedder.free()
        self.context.free()
        self.sampling.chains.free()
        self.model.free()


def load(command: Load, report: Callable[[Status], None], *, score: bool = False) -> Loaded:
    """Loads and warms up a model, and reports progress. With ``score``, every row may give logits.

    Raises LoadError, and keeps no memory then.
    """
    with ExitStack() as undo:
        loaded = _load(command, report, undo, score=score)
        undo.pop_all()
    return loaded


def _load(command: Load, report: Callable[[Status], None], undo: ExitStack, *, score: bool) -> Loaded:
    """See ``load``. ``undo`` gets what frees the parts that are loaded."""
    log = Log()
    options = read_options(command)
    devices = chosen(options, command.backend, all_gpus(command))
    path = find_model(options, command.model_id, command.directories)
    check_header(path)
    headers = read_headers(path)
    check_architecture(options, headers[0])
    options = with_layout(with_head(options, headers), headers[0])
    head = uses_head(options, headers) and not score
    adapters = find_adapters(command, options, headers)
    on_gpu = bool(devices)
    if options.exact:
        use_one_kernel(devices)
    report(Status(state="Loading"))
    last = -1

    def progress(done: float) -> None:
        nonlocal last
        percent = int(done * 100)
        if percent > last:
            last = percent
            report(Status(state="Loading", layers_loaded=percent, total_layers=100))

    model = Model(path, options, devices, progress, log, head=head)
    undo.callback(model.free)
    for adapter in adapters:
        model.add_adapter(adapter.path, adapter.identity, log)
    report(Status(state="Loaded", layers_loaded=model.n_layers, total_layers=model.n_layers))
    sizes = chunks(options, on_gpu=on_gpu)
    chunk, budget = sizes.beside, sizes.budget
    n_ctx = options.n_ctx or min(model.n_ctx_train, USABLE)
    outputs = budget if score else options.slots + SCORED_ROWS
    reduced = 1 if options.speculation == "off" else 1 + LONGEST
    rows = Rows(step=budget + options.slots, graph=sizes.alone, outputs=outputs, reduced=reduced)
    context = Context(model, options, n_ctx, rows, log)
    undo.callback(context.free)
    if options.cache_reuse is not None and not (context.generates and context.can_shift):
        message = "model card, [cuda] cache_reuse: this model's cache cannot be used at other positions"
        raise LoadError("model_misconfigured", message)
    report(Status(state="WarmingUp"))
    embedder = Embedder(model, options, context.generates, context.n_ctx, chunk, log)
    undo.callback(embedder.free)
    if embedder.pooling == "rank" and not _has_tensor(path, RANKING_HEADS):
        raise LoadError("model_load_failed", f'{path} has no ranking head, which pooling "rank" needs')
    _warm_up(context, embedder, score, model.adapters)
    if options.exact and context.generates:
        check_exact(context, rows.graph)
    on_gpus = on_gpu and not 0 <= options.n_gpu_layers <= model.n_layers
    chains = Chains(context)
    given = (context, chains, options)
    sampling = BackendSampling(chains) if score else backend_sampling(*given, can_cut=model.can_cut, on_gpus=on_gpus)
    threads = Threads(physical_cores(), len(usable_cpus()), _fixed_threads(command, options))
    draft: DraftModel | HeadDrafter | None
    if head and context.generates and context.rollback:
        draft = _open_head(options, model, context, threads, undo)
    else:
        draft = None if score else _load_draft(command, options, devices, model, context, chunk, threads, log, undo)
    tokenizer = GgufTokenizer(model)
    projector = None if score else projector_file(options, path)
    sight = None
    if projector is not None:
        sight = _load_sight(projector, options, devices, model, context, tokenizer, rows.graph, log, undo)
    names = tuple(device.name for device in devices) or (CPU,)
    capabilities = _capabilities(options, command.backend, names, model, context, embedder, tokenizer)
    if sight is not None:
        capabilities = capabilities.model_copy(update={"vision": True})
    max_itl_ms = options.max_itl_ms or (GPU_MAX_ITL_MS if on_gpu else CPU_MAX_ITL_MS)
    pace = Pace(max_itl_ms / 1000)
    disk = None if score else open_disk_tier(command, options, path, model, context, pace)
    pool = (
        CellPool(context, options.slots, IDLE_STEPS_ON_GPU if on_gpu else 0) if context.is_pool and not score else None
    )
    moved = None if options.cache_reuse is None else MovedCells(context, options.cache_reuse)
    cache = PrefixCache(pool or context, options.prefix_caches[0], disk, moved)
    speculate = options.speculation if context.rollback else "off"
    # A window reaches back from the last micro-batch, so rejected guesses must be in it with what precedes them.
    n_outputs = min(options.slots + SCORED_ROWS, sizes.alone)
    speculation = Speculation(speculate, n_outputs, draft, context.rollback)
    enough = budget if on_gpu else CPU_ENOUGH
    scheduler = Scheduler(options.slots, budget, chunk, enough, pace, cache, speculation, sizes.alone, pool, sight)
    if sight is not None and sight.is_flat:
        context.position = scheduler.position
    embedding_input = EmbeddingInput(model, tokenizer)
    return Loaded(
        model,
        context,
        embedder,
        tokenizer,
        embedding_input,
        capabilities,
        scheduler,
        cache,
        chunk,
        draft,
        sampling,
        threads,
        sight,
        {adapter.name: (adapter.identity, adapter.scale) for adapter in adapters},
    )


def _capabilities(
    options: CudaOptions,
    backend: str,
    devices: tuple[str, ...],
    model: Model,
    context: Context,
    embedder: Embedder,
    tokenizer: GgufTokenizer,
) -> Capabilities:
    return Capabilities(
        engine=ENGINE,
        engine_version=engine_version(),
        backend=backend,
        devices=devices,
        context_length=context.n_ctx if context.generates else embedder.longest,
        slots=options.slots,
        kv="pool" if context.is_pool else "split",
        vocabulary=model.n_vocab,
        grammar=context.generates,
        logprobs=context.generates,
        embeddings=embedder.pooling != "rank",
        rerank=embedder.pooling == "rank",
        adapters=tuple(each.name for each in options.lora) if context.generates else (),
        adapter_scales=bool(options.lora) and context.generates,
        model_bytes=model.size_bytes,
        kv_type="/".join(dict.fromkeys((options.cache_type_k, options.cache_type_v))),
        layers=model.layers,
        experts_in_ram=model.experts_in_ram,
        chat_template=options.chat_template or model.chat_template() or model.chat_template(b"tool_use"),
        notes=quality_notes(model.metadata),
        tool_template=None if options.chat_template else model.chat_template(b"tool_use"),
        bos_token=tokenizer.text_of(tokenizer.bos),
        eos_token=tokenizer.text_of(tokenizer.eos),
        special_tokens=tuple(tokenizer.special),
        special_ids=tuple(tokenizer.special.values()),
        fim=tokenizer.fim(),
    )


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


def _fixed_threads(command: Load, options: CudaOptions) -> tuple[int, int] | None:
    """Returns the model card's threads for steps of one row and of more; None if it sets neither."""
    if all(command.table.get(key) is None for key in ("threads", "threads_batch")):
        return None
    one = options.threads or physical_cores()
    return one, options.threads_batch or one


def _has_tensor(path: Path, names: Collection[str]) -> bool:
    return any(tensor.name in names for header in read_headers(path) for tensor in header.tensors)


def _warm_up(context: Context, embedder: Embedder, score: bool, adapters: Iterable[str]) -> None:
    """Computes one token, so that weights are paged in and kernels built before the first request.

    It does so with all adapters together as well, because that allocates what the largest graph needs. For an encoder,
    creates the context for texts instead. Raises LoadError.
    """
    if not context.generates:
        if score:
            raise LoadError("model_load_failed", "this model is an encoder, which predicts no next token")
        embedder.open()
        return
    for key in dict.fromkeys((adapter_key((each, 1.0) for each in adapters), "")):
        context.use_adapters(key)
        _decode_one(context)


def _decode_one(context: Context) -> None:
    batch = context.batch
    batch.tokens[0] = batch.positions[0] = batch.slots[0] = 0
    batch.outputs[0] = 1
    context.decode(1)
    context.logits(1)
    context.trim(0, 0)


def projector_file(options: CudaOptions, model: Path) -> Path | None:
    """Finds the projector beside the model's file and checks its header; None without one. Raises LoadError."""
    path = find_projector(options, model)
    if path is not None:
        check_projector(path)
    return path


def _load_sight(
    path: Path,
    options: CudaOptions,
    devices: Sequence[Gpu],
    model: Model,
    context: Context,
    tokenizer: GgufTokenizer,
    most_rows: int,
    log: Log,
    undo: ExitStack,
) -> Sight:
    """Loads the projector onto the first device of this machine, or else into RAM. Raises LoadError."""
    if not context.generates:
        raise LoadError("model_misconfigured", "model card, [cuda] mmproj: this model generates no text")
    device = next((each for each in devices if not each.remote and options.mmproj_offload is not False), None)
    threads = options.threads_batch or options.threads or physical_cores()
    projector = Projector(path, model, device, threads, options.flash_attn, log)
    found = path.stat()
    sight = Sight(projector, tokenizer, f"{found.st_size} {found.st_mtime_ns}", most_rows)
    undo.callback(sight.close)
    return sight


def draft_file(command: Load, options: CudaOptions) -> Path | None:
    """Finds the draft model's file and checks its header; None without a draft model. Raises LoadError with the key."""
    draft = options.draft
    if draft is None or options.speculation == "off":
        return None
    with _about(draft):
        path = find_model(draft, draft.repo or command.model_id, command.directories)
        check_header(path)
    return path


def draft_options(options: CudaOptions, draft: DraftOptions) -> CudaOptions:
    """Returns a draft model's options: those of the model, but on one device, because the drafts are waited for."""
    alone = {"split_mode": "none", "tensor_split": None, "backend_sampling": "off", "cache_reuse": None, "cpu_moe": 0}
    return options.model_copy(update={"n_gpu_layers": draft.n_gpu_layers, "lora": (), **alone})


def _load_draft(
    command: Load,
    options: CudaOptions,
    devices: Sequence[Gpu],
    target: Model,
    context: Context,
    chunk: int,
    threads: Threads,
    log: Log,
    undo: ExitStack,
) -> DraftModel | None:
    """Raises LoadError with the key at fault."""
    path, draft = draft_file(command, options), options.draft
    if path is None or draft is None:
        return None
    own = draft_options(options, draft)
    with _about(draft):
        if not (context.generates and context.rollback):
            raise LoadError("model_load_failed", "the model's cache cannot drop tokens, so it cannot verify guesses")
        model = Model(path, own, devices[:1] if draft.n_gpu_layers else (), lambda _: None, log)
        undo.callback(model.free)
        check_vocabulary(model, target)
        rows = Rows(step=max(chunk, options.slots * LITTLE), graph=chunk, outputs=options.slots)
        guessing = Context(model, own, context.n_ctx, rows, log)
        undo.callback(guessing.free)
        if not (guessing.generates and model.can_cut):
            raise LoadError("model_load_failed", "its cache cannot drop tokens, as a draft model must")
    _decode_one(guessing)
    return DraftModel(model, guessing, options.slots, chunk, draft.max_tokens, threads)


def _open_head(options: CudaOptions, model: Model, context: Context, threads: Threads, undo: ExitStack) -> HeadDrafter:
    """Raises LoadError."""
    guessing = HeadContext(model, options, context.n_ctx, options.slots * WAITING)
    undo.callback(guessing.free)
    keep_states(context)
    return HeadDrafter(guessing, options.slots, threads)


@contextmanager
def _about(draft: DraftOptions) -> Generator[None]:
    """Attributes a LoadError in its body to the draft model's key in the card."""
    try:
        yield
    except LoadError as error:
        key = "file" if draft.path is None else "path"
        raise LoadError(error.code, f"model card, [cuda.draft] {key}: {error}") from error
