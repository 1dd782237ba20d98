"""Checks a request against the loaded model before the engine hears of it. The same words in every runner."""

from collections.abc import Sequence

from exo.worker.messages import Failed, Generate


def refusal(request: Generate, prompt: Sequence[int], vocabulary: int, n_ctx: int) -> Failed | None:
    """Why the request, whose prompt is these token ids, cannot be served; None if it can.

    ``vocabulary`` counts the model's tokens, ``n_ctx`` what one sequence may hold.
    """

    def refused(param: str, reason: str) -> Failed:
        return Failed(id=request.id, code="invalid_request", message=f"{param}: {reason}", param=param)

    if not prompt:
        return refused("prompt", "it is empty; at least one token is needed")
    for param, ids in (("prompt", prompt), ("logit_bias", request.sampling.logit_bias)):
        if wrong := [token for token in ids if not 0 <= token < vocabulary]:
            return refused(param, f"token id {wrong[0]} is not in 0 to {vocabulary - 1}")
    if "" in request.stop:
        return refused("stop", "a stop string is empty")
    if len(prompt) >= n_ctx:
        message = (
            f"the prompt has {len(prompt)} tokens, but the context holds {n_ctx} for prompt and output together, "
            f"so a prompt may have at most {n_ctx - 1}"
        )
        return Failed(id=request.id, code="context_length_exceeded", message=message, param="prompt")
    return None


def length_limit(request: Generate, n_prompt: int, n_ctx: int) -> int:
    """The length, prompt and output, at which the sequence ends with finish reason "length"."""
    return n_ctx if request.max_tokens is None else min(n_ctx, n_prompt + request.max_tokens)
