"""Loads a model: from a ``Load`` command to a warm context, scheduler and tokenizer."""

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import final

from exo.worker.protocol.commands import Load
from exo.worker.protocol.cores import physical_cores, usable_cpus
from exo.worker.protocol.events import Capabilities, Status
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.memory_plan import USABLE
from exo.worker.runner_common.model_files.gguf import GgufHeader, quality_notes
from exo.worker.runner_cuda.adapter_key import Scaled, adapter_key
from exo.worker.runner_cuda.bindings import Context, Rows, engine_version
from exo.worker.runner_cuda.cell_pool import IDLE_STEPS_ON_GPU, CellPool
from exo.worker.runner_cuda.embedding import RANKING_HEADS, Embedder
from exo.worker.runner_cuda.embedding_input import EmbeddingInput
from exo.worker.runner_cuda.loading.devices import ENGINE
from exo.worker.runner_cuda.loading.exact import check_exact, use_one_kernel
from exo.worker.runner_cuda.loading.heads import uses_head
from exo.worker.runner_cuda.loading.inputs import (
    LoadInputs,
    about_draft,
    draft_file,
    draft_options,
    projector_file,
    read_inputs,
)
from exo.worker.runner_cuda.loading.kv_layout import with_layout
from exo.worker.runner_cuda.loading.llama_log import Log
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CPU, CudaOptions, DraftOptions, chunks
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
    inputs = read_inputs(command)
    with ExitStack() as undo:
        loading = _LoadSteps(command, inputs, undo, score=score)
        report(Status(state="Loading"))
        model = loading.open_model(report)
        report(Status(state="Loaded", layers_loaded=model.n_layers, total_layers=model.n_layers))
        context = loading.open_context(model)
        report(Status(state="WarmingUp"))
        embedder = loading.warm_up(model, context)
        loaded = loading.complete(model, context, embedder)
        undo.pop_all()
    return loaded


@final
class _LoadSteps:
    """The steps of a load. ``undo`` gets what frees the parts that are loaded. Each step raises LoadError."""

    def __init__(self, command: Load, inputs: LoadInputs, undo: ExitStack, *, score: bool) -> None:
        self._command = command
        self._inputs = inputs
        self._options = with_layout(inputs.options, inputs.headers[0])
        self._on_gpu = bool(inputs.devices)
        self._sizes = chunks(self._options, on_gpu=self._on_gpu)
        self._head = uses_head(inputs.options, inputs.headers) and not score
        self._score = score
        self._undo = undo
        self._log = Log()

    def open_model(self, report: Callable[[Status], None]) -> Model:
        """Loads the weights and the adapters."""
        inputs, last = self._inputs, -1

        def progress(done: float) -> None:
            nonlocal last
            percent = int(done * 100)
            if percent > last:
                last = percent
                report(Status(state="Loading", layers_loaded=percent, total_layers=100))

        if self._options.exact:
            use_one_kernel(inputs.devices)
        model = Model(inputs.path, self._options, inputs.devices, progress, self._log, head=self._head)
        self._undo.callback(model.free)
        for adapter in inputs.adapters:
            model.add_adapter(adapter.path, adapter.identity, self._log)
        return model

    def open_context(self, model: Model) -> Context:
        """Makes the KV cache and the compute buffers."""
        options, sizes = self._options, self._sizes
        n_ctx = options.n_ctx or min(model.n_ctx_train, USABLE)
        outputs = sizes.budget if self._score else options.slots + SCORED_ROWS
        reduced = 1 if options.speculation == "off" else 1 + LONGEST
        rows = Rows(step=sizes.budget + options.slots, graph=sizes.alone, outputs=outputs, reduced=reduced)
        context = Context(model, options, n_ctx, rows, self._log)
        self._undo.callback(context.free)
        if options.cache_reuse is not None and not (context.generates and context.can_shift):
            message = "model card, [cuda] cache_reuse: this model's cache cannot be used at other positions"
            raise LoadError("model_misconfigured", message)
        if self._score and not context.generates:
            raise LoadError("model_load_failed", "this model is an encoder, which predicts no next token")
        return context

    def warm_up(self, model: Model, context: Context) -> Embedder:
        """Computes one token, so that weights are paged in and kernels built before the first request.

        It does so with all adapters together as well, because that allocates what the largest graph needs. For an
        encoder, creates the context for texts instead, which the embedder has.
        """
        options = self._options
        embedder = Embedder(model, options, context.generates, context.n_ctx, self._sizes.beside, self._log)
        self._undo.callback(embedder.free)
        if embedder.pooling == "rank" and not _has_tensor(self._inputs.headers, RANKING_HEADS):
            message = f'{self._inputs.path} has no ranking head, which pooling "rank" needs'
            raise LoadError("model_load_failed", message)
        if context.generates:
            for key in dict.fromkeys((adapter_key((each, 1.0) for each in model.adapters), "")):
                context.use_adapters(key)
                context.decode_one()
        else:
            embedder.open()
        if options.exact and context.generates:
            check_exact(context, self._sizes.alone)
        return embedder

    def complete(self, model: Model, context: Context, embedder: Embedder) -> Loaded:
        """Opens the drafter and the projector, and makes the scheduler and the sampler."""
        options, sizes = self._options, self._sizes
        on_gpus = self._on_gpu and not 0 <= options.n_gpu_layers <= model.n_layers
        chains = Chains(context)
        if self._score:
            sampling = BackendSampling(chains)
        else:
            sampling = backend_sampling(context, chains, options, can_cut=model.can_cut, on_gpus=on_gpus)
        threads = Threads(physical_cores(), len(usable_cpus()), _fixed_threads(self._command, options))
        draft = self._open_drafter(model, context, threads)
        tokenizer = GgufTokenizer(model)
        sight = self._open_sight(model, context, tokenizer)
        capabilities = self._capabilities(model, context, embedder, tokenizer, sees=sight is not None)
        scheduler, cache = self._make_scheduler(model, context, draft, sight)
        return Loaded(
            model,
            context,
            embedder,
            tokenizer,
            EmbeddingInput(model, tokenizer),
            capabilities,
            scheduler,
            cache,
            sizes.beside,
            draft,
            sampling,
            threads,
            sight,
            {adapter.name: (adapter.identity, adapter.scale) for adapter in self._inputs.adapters},
        )

    def _open_drafter(self, model: Model, context: Context, threads: Threads) -> DraftModel | HeadDrafter | None:
        options = self._options
        if self._head and context.generates and context.rollback:
            states = HeadContext(model, options, context.n_ctx, options.slots * WAITING)
            self._undo.callback(states.free)
            keep_states(context)
            return HeadDrafter(states, options.slots, threads)
        path = None if self._score else draft_file(self._command, options)
        if path is None or options.draft is None:
            return None
        with about_draft(options.draft):
            return self._open_draft_model(path, options.draft, model, context, threads)

    def _open_draft_model(
        self, path: Path, draft: DraftOptions, target: Model, context: Context, threads: Threads
    ) -> DraftModel:
        options, chunk = draft_options(self._options, draft), self._sizes.beside
        if not (context.generates and context.rollback):
            raise LoadError("model_load_failed", "the model's cache cannot drop tokens, so it cannot verify guesses")
        devices = self._inputs.devices[:1] if draft.n_gpu_layers else ()
        model = Model(path, options, devices, lambda _: None, self._log)
        self._undo.callback(model.free)
        check_vocabulary(model, target)
        rows = Rows(step=max(chunk, options.slots * LITTLE), graph=chunk, outputs=options.slots)
        guessing = Context(model, options, context.n_ctx, rows, self._log)
        self._undo.callback(guessing.free)
        if not (guessing.generates and model.can_cut):
            raise LoadError("model_load_failed", "its cache cannot drop tokens, as a draft model must")
        guessing.decode_one()
        return DraftModel(model, guessing, options.slots, chunk, draft.max_tokens, threads)

    def _open_sight(self, model: Model, context: Context, tokenizer: GgufTokenizer) -> Sight | None:
        """Loads the projector onto the first device of this machine, or else into RAM."""
        options = self._options
        path = None if self._score else projector_file(options, self._inputs.path)
        if path is None:
            return None
        if not context.generates:
            raise LoadError("model_misconfigured", "model card, [cuda] mmproj: this model generates no text")
        near = [] if options.mmproj_offload is False else [each for each in self._inputs.devices if not each.remote]
        threads = options.threads_batch or options.threads or physical_cores()
        projector = Projector(path, model, next(iter(near), None), threads, options.flash_attn, self._log)
        found = path.stat()
        sight = Sight(projector, tokenizer, f"{found.st_size} {found.st_mtime_ns}", self._sizes.alone)
        self._undo.callback(sight.close)
        return sight

    def _capabilities(
        self, model: Model, context: Context, embedder: Embedder, tokenizer: GgufTokenizer, *, sees: bool
    ) -> Capabilities:
        options = self._options
        return Capabilities(
            engine=ENGINE,
            engine_version=engine_version(),
            backend=self._command.backend,
            devices=tuple(each.name for each in self._inputs.devices) or (CPU,),
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
            vision=sees,
        )

    def _make_scheduler(
        self, model: Model, context: Context, draft: DraftModel | HeadDrafter | None, sight: Sight | None
    ) -> tuple[Scheduler, PrefixCache]:
        options, sizes, on_gpu = self._options, self._sizes, self._on_gpu
        pace = Pace((options.max_itl_ms or (GPU_MAX_ITL_MS if on_gpu else CPU_MAX_ITL_MS)) / 1000)
        pool = disk = None
        if not self._score:
            disk = open_disk_tier(self._command, options, self._inputs.path, model, context, pace)
            pool = CellPool(context, options.slots, IDLE_STEPS_ON_GPU if on_gpu else 0) if context.is_pool else None
        moved = None if options.cache_reuse is None else MovedCells(context, options.cache_reuse)
        cache = PrefixCache(pool or context, options.prefix_caches[0], disk, moved)
        speculate = options.speculation if context.rollback else "off"
        # A window reaches back from the last micro-batch, so rejected guesses must be in it with what precedes them.
        n_outputs = min(options.slots + SCORED_ROWS, sizes.alone)
        speculation = Speculation(speculate, n_outputs, draft, context.rollback)
        enough = sizes.budget if on_gpu else CPU_ENOUGH
        scheduler = Scheduler(
            options.slots, sizes.budget, sizes.beside, enough, pace, cache, speculation, sizes.alone, pool, sight
        )
        if sight is not None and sight.is_flat:
            context.position = scheduler.position
        return scheduler, cache


def _fixed_threads(command: Load, options: CudaOptions) -> tuple[int, int] | None:
    """Returns the model card's threads for steps of one row and of more; None if it sets neither."""
    if all(command.table.get(key) is None for key in ("threads", "threads_batch")):
        return None
    one = options.threads or physical_cores()
    return one, options.threads_batch or one


def _has_tensor(headers: Iterable[GgufHeader], names: Collection[str]) -> bool:
    return any(tensor.name in names for header in headers for tensor in header.tensors)
