"""Checks a request against the loaded model before the engine hears of it."""

from exo.worker.messages import Failed, Generate, Text
from exo.worker.runner_cuda.sampler import Sampler
from exo.worker.runner_cuda.sequence import Sequence
from exo.worker.runner_cuda.tokenizer import Tokenizer


def admit(request: Generate, tokenizer: Tokenizer, n_ctx: int) -> Sequence | Failed:
    """The sequence to queue, or why the request cannot be served. ``n_ctx`` is what one sequence may hold."""
    tokens = _tokens(request, tokenizer)
    if not tokens:
        return _refused(request, "prompt: it is empty; at least one token is needed", "prompt")
    if wrong := next((token for token in tokens if not 0 <= token < tokenizer.n_vocab), None):
        return _refused(request, f"prompt: token id {wrong} is not in 0 to {tokenizer.n_vocab - 1}", "prompt")
    if wrong := next((token for token in request.sampling.logit_bias if not 0 <= token < tokenizer.n_vocab), None):
        return _refused(request, f"logit_bias: token id {wrong} is not in 0 to {tokenizer.n_vocab - 1}", "logit_bias")
    if "" in request.stop:
        return _refused(request, "stop: a stop string is empty", "stop")
    if len(tokens) >= n_ctx:
        message = (
            f"the prompt has {len(tokens)} tokens, but the context holds {n_ctx} for prompt and output together, "
            f"so a prompt may have at most {n_ctx - 1}"
        )
        return Failed(id=request.id, code="context_length_exceeded", message=message, param="prompt")
    limit = n_ctx if request.max_tokens is None else min(n_ctx, len(tokens) + request.max_tokens)
    sampler = Sampler(request.sampling, tokenizer.eog_tokens if request.ignore_eos else ())
    sampler.accept_prompt(tokens)
    return Sequence(
        id=request.id,
        tokens=tokens,
        n_prompt=len(tokens),
        n_limit=limit,
        sampler=sampler,
    )


def _tokens(request: Generate, tokenizer: Tokenizer) -> list[int]:
    texts = [part for part in request.prompt if isinstance(part, Text)]
    if texts:
        return tokenizer.encode(texts)
    return [part for part in request.prompt if isinstance(part, int)]


def _refused(request: Generate, message: str, param: str) -> Failed:
    return Failed(id=request.id, code="invalid_request", message=message, param=param)
