"""Gives the front end the operations of the vLLM engine."""

from functools import partial

from exo.worker.protocol.commands import Generate, Load
from exo.worker.protocol.events import Failed
from exo.worker.runner_common.constraint import Constraint
from exo.worker.runner_common.front_end import FrontEnd, LoadedEngine, Prepared
from exo.worker.runner_common.output_processor import Emitter
from exo.worker.runner_common.pictures import has_pictures
from exo.worker.runner_common.sequence import adapter_name, ends_at
from exo.worker.runner_vllm.engine import VllmEngine
from exo.worker.runner_vllm.estimate import estimate, with_choice
from exo.worker.runner_vllm.loader import VllmLoaded, load
from exo.worker.runner_vllm.options import ran_out_of_memory
from exo.worker.runner_vllm.sequence import Choice, Seen, VllmSequence


def front_end(emitter: Emitter) -> FrontEnd[VllmSequence]:
    """Returns the front end of a runner that has no model yet."""
    return FrontEnd(emitter, lambda command: _load(command, emitter), estimate, _explain)


def _load(command: Load, emitter: Emitter) -> LoadedEngine[VllmSequence]:
    """Raises LoadError."""
    loaded = load(with_choice(command), emitter.put)
    engine = VllmEngine(loaded.core, loaded.tokenizer, emitter)
    return LoadedEngine(
        tokenizer=loaded.tokenizer,
        capabilities=loaded.capabilities,
        longest_text=loaded.capabilities.context_length,
        closing=loaded.tokenizer.closing,
        text_tokens=loaded.tokenizer.text_tokens,
        prepare=partial(_prepare, loaded),
        commands=engine.commands,
        run=engine.run,
        counts=engine.counts,
        no_generation="it is loaded to make vectors of texts only" if loaded.capabilities.embeddings else "",
    )


def _prepare(loaded: VllmLoaded, request: Generate) -> Prepared[VllmSequence]:
    """Raises PictureError."""
    if loaded.sight is not None and has_pictures(request.prompt):
        seen = loaded.sight.encode_prompt(request.prompt)
    else:
        tokens = loaded.tokenizer.encode(request.prompt)
        seen = Seen(tokens, tokens, [])
    n_prompt = len(seen.prompt)

    def new_sequence(n_limit: int, constraint: Constraint | None) -> VllmSequence:
        return VllmSequence(
            id=request.id,
            tokens=[*seen.tokens, *request.delivered],
            n_limit=n_limit,
            choice=Choice(
                sampling=request.sampling,
                n_prompt=n_prompt,
                ends=loaded.tokenizer.eog_tokens,
                ends_at=ends_at(request, n_prompt),
                constraint=constraint,
            ),
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            cache_prompt=request.cache_prompt,
            adapter=adapter_name(request),
            pictures=seen.pictures,
        )

    return Prepared(seen.prompt, new_sequence)


def _explain(error: Exception) -> Failed:
    """VLLM has no exceptions of its own, so any exception may be its."""
    code = "out_of_memory" if ran_out_of_memory(error) else "engine_error"
    return Failed(code=code, message=f"vLLM failed: {type(error).__name__}: {error}")
