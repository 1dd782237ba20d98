"""Checks a request against the loaded model before the engine hears of it. The same words in every runner."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from exo.worker.protocol.messages import (
    MAX_PROMPT_LOGPROBS,
    MAX_TOKENIZED,
    PART_BYTES,
    PART_TOKENS,
    Capabilities,
    Embed,
    Failed,
    FinishReason,
    Generate,
    Rank,
    Tokenize,
    Tokenized,
)
from exo.worker.runner_common.detokenizer import TextStream, Vocabulary

ARRIVED = 16
"""Requests that a runner reads ahead of the one that it tokenizes. What comes then stays in the pipe."""


def refusal(request: Generate, prompt: Sequence[int], vocabulary: int, n_ctx: int) -> Failed | None:
    """Why the request, whose prompt is these token ids, cannot be served; None if it can.

    ``vocabulary`` counts the model's tokens, ``n_ctx`` what one sequence may hold.
    """
    if not prompt:
        return _refused(request.id, "prompt", "it is empty; at least one token is needed")
    tokens = {"prompt": prompt, "logit_bias": request.sampling.logit_bias, "delivered": request.delivered}
    for param, ids in tokens.items():
        if wrong := _unknown(ids, vocabulary):
            return _refused(request.id, param, wrong)
    if request.prompt_logprobs is not None:
        most = MAX_PROMPT_LOGPROBS // (1 + request.prompt_logprobs)
        if len(prompt) > most:
            reason = f"with {request.prompt_logprobs}, a prompt may have at most {most} tokens (it has {len(prompt)})"
            return _refused(request.id, "prompt_logprobs", reason)
    if "" in request.stop:
        return _refused(request.id, "stop", "a stop string is empty")
    if len(prompt) >= n_ctx:
        message = (
            f"the prompt has {len(prompt)} tokens, but the context holds {n_ctx} for prompt and output together, "
            f"so a prompt may have at most {n_ctx - 1}"
        )
        return Failed(id=request.id, code="context_length_exceeded", message=message, param="prompt")
    return None


def input_refusal(
    request: Embed | Rank, tokens: Sequence[int], capabilities: Capabilities, longest: int
) -> Failed | None:
    """Why a text, which is these token ids, cannot be made a vector or a score; None if it can.

    ``longest`` is how many tokens a text may have.
    """
    match request:
        case Embed():
            if not capabilities.embeddings:
                return _refused(request.id, "model", "it makes no vectors of texts")
            param, subject = "prompt", "the text has"
            empty = not any(isinstance(part, int) or part.text for part in request.prompt)
        case Rank():
            if not capabilities.rerank:
                return _refused(request.id, "model", "it has no head that scores a document for a query")
            param, subject = "document" if request.query else "query", "query and document have together"
            empty = not request.query or not request.document
    if empty or not tokens:
        return _refused(request.id, param, "it is empty; at least one token is needed")
    if wrong := _unknown(tokens, capabilities.vocabulary):
        return _refused(request.id, param, wrong)
    if len(tokens) > longest:
        message = f"{subject} {len(tokens)} tokens, but a text may have at most {longest} here"
        return Failed(id=request.id, code="context_length_exceeded", message=message, param=param)
    return None


def within(request: Embed, tokens: Sequence[int], longest: int, closing: Sequence[int]) -> list[int]:
    """The text's tokens, cut to ``longest`` where the request says so. ``closing`` control tokens at the end stay."""
    if not request.truncate or len(tokens) <= longest:
        return list(tokens)
    kept = list(closing)[-longest:] if closing and list(tokens[-len(closing) :]) == list(closing) else []
    return [*tokens[: longest - len(kept)], *kept]


def tokenized(
    request: Tokenize, tokens: Sequence[int], vocabulary: int, pieces: Vocabulary
) -> Iterator[Tokenized | Failed]:
    """The answer, in parts, to a request whose tokens are these, of a model that has ``vocabulary`` of them."""
    if len(tokens) > MAX_TOKENIZED:
        yield _refused(request.id, "prompt", f"it has {len(tokens)} tokens; at most {MAX_TOKENIZED} can be told")
        return
    if wrong := _unknown(tokens, vocabulary):
        yield _refused(request.id, "prompt", wrong)
        return
    start, spelt, n_bytes = 0, list[tuple[int, ...]](), 0
    for at, token in enumerate(tokens):
        if at - start == PART_TOKENS or n_bytes > PART_BYTES:
            yield Tokenized(id=request.id, tokens=tuple(tokens[start:at]), bytes=tuple(spelt), more=True)
            start, spelt, n_bytes = at, [], 0
        spelt.append(tuple(pieces.piece_of(token)))
        n_bytes += len(spelt[-1])
    yield Tokenized(id=request.id, tokens=tuple(tokens[start:]), bytes=tuple(spelt))


def _unknown(tokens: Iterable[int], vocabulary: int) -> str | None:
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    return None if wrong is None else f"token id {wrong} is not in 0 to {vocabulary - 1}"


def _refused(request: str, param: str, reason: str) -> Failed:
    return Failed(id=request, code="invalid_request", message=f"{param}: {reason}", param=param)


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
    """Goes through the tokens delivered as when they were generated; what they released was delivered with them.

    A request for no tokens at all has something left: its prompt is to be computed.
    """
    text = TextStream(request.stop)
    ended: FinishReason | None = None
    for token in request.delivered:
        text.take(token, output, show_special=request.show_special)
        if output.is_eog(token):
            ended = "stop"
    if text.stopped_by is not None:
        ended = "stop"
    elif ended is None and request.delivered and n_prompt + len(request.delivered) >= n_limit:
        ended = "length"
    return Resumed(text, ended)
