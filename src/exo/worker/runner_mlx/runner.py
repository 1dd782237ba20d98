"""Gives the front end the operations of the MLX engine."""

from collections.abc import Sequence
from functools import partial

from exo.worker.protocol.commands import Generate, Load
from exo.worker.protocol.events import Failed
from exo.worker.runner_common.constraint import Constraint
from exo.worker.runner_common.front_end import FrontEnd, LoadedEngine, Prepared
from exo.worker.runner_common.hf_tokenizer import TransformersTokenizer
from exo.worker.runner_common.output_processor import Emitter
from exo.worker.runner_common.sequence import adapter_name, ends_at
from exo.worker.runner_mlx.engine import MlxEngine
from exo.worker.runner_mlx.loading.estimate import estimate, with_choice
from exo.worker.runner_mlx.loading.loader import load
from exo.worker.runner_mlx.model import ran_out_of_memory
from exo.worker.runner_mlx.sequence import MlxSequence


def front_end(emitter: Emitter) -> FrontEnd[MlxSequence]:
    """Returns the front end of a runner that has no model yet."""
    return FrontEnd(emitter, lambda command: _load(command, emitter), estimate, _explain)


def _load(command: Load, emitter: Emitter) -> LoadedEngine[MlxSequence]:
    """Loads in the thread that will compute, since MLX's streams belong to the thread that made them.

    Raises LoadError.
    """
    loaded = load(with_choice(command), emitter.put)
    engine, ranks = MlxEngine(loaded, emitter), loaded.ranks

    def run() -> None:
        try:
            engine.run()
        except (RuntimeError, MemoryError):
            if ranks is not None:
                ranks.blame()
            raise
        if ranks is not None:
            ranks.end()

    return LoadedEngine(
        tokenizer=loaded.tokenizer,
        capabilities=loaded.capabilities,
        longest_text=loaded.embedder.longest,
        closing=loaded.tokenizer.closing,
        text_tokens=loaded.tokenizer.text_tokens,
        prepare=partial(_prepare, loaded.tokenizer, ("", *loaded.capabilities.adapters)),
        commands=engine.commands,
        run=run,
        counts=engine.counts,
    )


def _prepare(tokenizer: TransformersTokenizer, adapters: Sequence[str], request: Generate) -> Prepared[MlxSequence]:
    """``adapters`` are names by number; the first one stands for none."""
    prompt = tokenizer.encode(request.prompt)

    def new_sequence(n_limit: int, constraint: Constraint | None) -> MlxSequence:
        return MlxSequence(
            id=request.id,
            tokens=[*prompt, *request.delivered],
            n_prompt=len(prompt),
            n_limit=n_limit,
            sampling=request.sampling,
            ends=tokenizer.eog_tokens,
            ends_at=ends_at(request, len(prompt)),
            constraint=constraint,
            adapter=adapters.index(adapter_name(request)),
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
            cache_prompt=request.cache_prompt,
        )

    return Prepared(prompt, new_sequence)


def _explain(error: Exception) -> Failed | None:
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    code = "out_of_memory" if ran_out_of_memory(error) else "engine_error"
    return Failed(code=code, message=f"MLX failed: {error}")
