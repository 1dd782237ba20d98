"""Gives the front end the operations of the llama.cpp engine."""

from functools import partial

from exo.worker.protocol.commands import Generate, Load, UsedAdapter
from exo.worker.protocol.events import Failed
from exo.worker.runner_common.constraint import Constraint
from exo.worker.runner_common.front_end import FrontEnd, LoadedEngine, Prepared
from exo.worker.runner_common.output_processor import Emitter
from exo.worker.runner_common.pictures import has_pictures
from exo.worker.runner_common.sequence import ends_at
from exo.worker.runner_cuda.adapter_key import Scaled, adapter_key
from exo.worker.runner_cuda.bindings import EngineError
from exo.worker.runner_cuda.engine import CudaEngine
from exo.worker.runner_cuda.loading.estimate import estimate, with_choice
from exo.worker.runner_cuda.loading.loader import Loaded, load
from exo.worker.runner_cuda.sampling.sampler import Sampler
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.vision.span import Span


def front_end(emitter: Emitter) -> FrontEnd[Sequence]:
    """Returns the front end of a runner that has no model yet."""
    return FrontEnd(emitter, lambda command: _load(command, emitter), estimate, _explain)


def _load(command: Load, emitter: Emitter) -> LoadedEngine[Sequence]:
    """Raises LoadError."""
    loaded = load(with_choice(command), emitter.put)
    engine = CudaEngine(loaded, emitter)

    def run() -> None:
        engine.run()
        loaded.free()

    return LoadedEngine(
        tokenizer=loaded.tokenizer,
        capabilities=loaded.capabilities,
        longest_text=loaded.embedder.longest,
        closing=loaded.embedding_input.closing,
        text_tokens=loaded.embedding_input.tokens,
        prepare=partial(_prepare, loaded),
        commands=engine.commands,
        run=run,
        counts=engine.counts,
        no_generation="" if loaded.context.generates else "it is an encoder, which makes vectors of texts only",
        cpu_use=loaded.threads.use,
        prefix_use=loaded.prefixes.use,
    )


def _prepare(loaded: Loaded, request: Generate) -> Prepared[Sequence]:
    """Raises PictureError."""
    tokenizer, sight = loaded.tokenizer, loaded.sight
    if sight is not None and has_pictures(request.prompt):
        prompt, pictures = sight.encode_prompt(request.prompt)
    else:
        prompt, pictures = tokenizer.encode(request.prompt), list[Span]()

    def new_sequence(n_limit: int, constraint: Constraint | None) -> Sequence:
        sampler = Sampler(request.sampling, tokenizer.eog_tokens, ends_at(request, len(prompt)))
        sampler.accept_prompt([token for token in prompt if token >= 0])
        for token in request.delivered:
            sampler.accept(token)
        return Sequence(
            id=request.id,
            tokens=[*prompt, *request.delivered],
            n_prompt=len(prompt),
            n_prefill=len(prompt) + len(request.delivered),
            n_limit=n_limit,
            sampler=sampler,
            is_open=request.max_tokens is None,
            constraint=constraint,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            cache_prompt=request.cache_prompt,
            adapter=adapter_key(_scaled(loaded, each) for each in request.adapters),
            exact=request.exact or bool(request.delivered),
            pictures=pictures,
            boundaries=[at for at, token in enumerate(prompt) if tokenizer.is_control(token)],
        )

    return Prepared(prompt, new_sequence)


def _scaled(loaded: Loaded, used: UsedAdapter) -> Scaled:
    identity, scale = loaded.adapters[used.name]
    return identity, scale if used.scale is None else used.scale


def _explain(error: Exception) -> Failed | None:
    return Failed(code="engine_error", message=str(error)) if isinstance(error, EngineError) else None
