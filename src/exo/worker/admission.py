"""Checks a request against the loaded model before the engine hears of it. The same words in every runner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from exo.worker.messages import Failed, FinishReason, Generate
from exo.worker.text import TextStream


class Vocabulary(Protocol):
    """What a runner's tokenizer knows of its tokens."""

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text."""
        ...

    def is_eog(self, token: int) -> bool:
        """Whether a token ends generation."""
        ...


def refusal(request: Generate, prompt: Sequence[int], vocabulary: int, n_ctx: int) -> Failed | None:
    """Why the request, whose prompt is these token ids, cannot be served; None if it can.

    ``vocabulary`` counts the model's tokens, ``n_ctx`` what one sequence may hold.
    """

    def refused(param: str, reason: str) -> Failed:
        return Failed(id=request.id, code="invalid_request", message=f"{param}: {reason}", param=param)

    if not prompt:
        return refused("prompt", "it is empty; at least one token is needed")
    tokens = {"prompt": prompt, "logit_bias": request.sampling.logit_bias, "delivered": request.delivered}
    for param, ids in tokens.items():
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


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where the tokens delivered have left a sequence; at its beginning if there are none."""

    text: TextStream
    """Has seen them, so it holds back what was held back."""
    ended: FinishReason | None
    """Not None where nothing is left to generate: the runner before died between the last token and ``Finished``."""


def resume(request: Generate, n_prompt: int, n_limit: int, output: Vocabulary) -> Resumed:
    """Goes through the tokens delivered as when they were generated; what they released was delivered with them."""
    text = TextStream(request.stop)
    ended: FinishReason | None = None
    for token in request.delivered:
        if output.is_eog(token):
            ended = "stop"
        else:
            text.push(output.bytes_of(token))
    if text.stopped_by is not None:
        ended = "stop"
    elif ended is None and n_prompt + len(request.delivered) >= n_limit:
        ended = "length"
    return Resumed(text, ended)
