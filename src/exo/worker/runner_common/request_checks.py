"""Checks a request against the loaded model before the engine gets it. All runners refuse in the same words."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from exo.worker.protocol.commands import (
    Embed,
    Generate,
    Rank,
    Request,
    Text,
    Tokenize,
    UsedAdapter,
)
from exo.worker.protocol.events import (
    Capabilities,
    Failed,
    FinishReason,
    Tokenized,
)
from exo.worker.protocol.messages import (
    MAX_PROMPT_LOGPROBS,
    MAX_TOKENIZED,
    PART_BYTES,
    PART_TOKENS,
)
from exo.worker.runner_common.detokenizer import TextStream, Vocabulary
from exo.worker.runner_common.pictures import has_pictures


def refusal(request: Generate, prompt: Sequence[int], able: Capabilities) -> Failed | None:
    """Returns the refusal of a request whose prompt has these token ids; None if it can be served.

    Ids below 0 stand for pictures.
    """
    vocabulary, n_ctx = able.vocabulary, able.context_length
    if not prompt:
        return refused(request.id, "prompt", "it is empty; at least one token is needed")
    if wrong := _wrong_adapters(request.adapters, able):
        return refused(request.id, "adapters", wrong)
    tokens = {
        "prompt": () if has_pictures(request.prompt) else prompt,
        "logit_bias": request.sampling.logit_bias,
        "allowed": request.sampling.allowed,
        "delivered": request.delivered,
        "stop_tokens": request.stop_tokens,
    }
    for param, ids in tokens.items():
        if wrong := _unknown(ids, vocabulary):
            return refused(request.id, param, wrong)
    if request.prompt_logprobs is not None:
        if min(prompt) < 0:
            return refused(request.id, "prompt_logprobs", "a picture in the prompt has no log-probabilities")
        most = MAX_PROMPT_LOGPROBS // (1 + request.prompt_logprobs)
        if len(prompt) > most:
            reason = f"with {request.prompt_logprobs}, a prompt may have at most {most} tokens (it has {len(prompt)})"
            return refused(request.id, "prompt_logprobs", reason)
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        return refused(request.id, "min_tokens", f"{request.min_tokens} is more than max_tokens, {request.max_tokens}")
    if "" in request.stop:
        return refused(request.id, "stop", "a stop string is empty")
    if len(prompt) >= n_ctx:
        message = (
            f"the prompt has {len(prompt)} tokens, but the context holds {n_ctx} for prompt and output together, "
            f"so a prompt may have at most {n_ctx - 1}"
        )
        return _overflow(request.id, "prompt", message, len(prompt), n_ctx)
    return None


def _wrong_adapters(used: Sequence[UsedAdapter], able: Capabilities) -> str:
    names = [each.name for each in used]
    for name in names:
        if name not in able.adapters:
            known = f"accepted are {', '.join(able.adapters)}" if able.adapters else "the model has none here"
            return f"there is no adapter {name!r}; {known}"
        if names.count(name) > 1:
            return f"{name!r} is used twice"
    if not able.adapter_scales and (len(used) > 1 or any(each.scale is not None for each in used)):
        return "only one adapter can be used here, with its own scale"
    return ""


def picture_refusal(request: Request, capabilities: Capabilities) -> Failed | None:
    """Returns the refusal of a request for its pictures; None if it has none, or they can be seen."""
    if isinstance(request, Rank) or not has_pictures(request.prompt):
        return None
    if not isinstance(request, Generate):
        return refused(request.id, "prompt", "a picture is only for a text to generate from")
    return None if capabilities.vision else refused(request.id, "prompt", "this model takes no pictures here")


def input_refusal(
    request: Embed | Rank, tokens: Sequence[int], capabilities: Capabilities, longest: int
) -> Failed | None:
    """Returns the refusal of a text to embed or rank with these token ids; None if it can be served.

    ``longest`` is the most tokens of a text.
    """
    match request:
        case Embed():
            if not capabilities.embeddings:
                return refused(request.id, "model", "it makes no vectors of texts")
            param, subject = "prompt", "the text has"
            empty = not any(part.text if isinstance(part, Text) else True for part in request.prompt)
        case Rank():
            if not capabilities.rerank:
                return refused(request.id, "model", "it has no head that scores a document for a query")
            param, subject = "document" if request.query else "query", "query and document have together"
            empty = not request.query or not request.document
    if empty or not tokens:
        return refused(request.id, param, "it is empty; at least one token is needed")
    if wrong := _unknown(tokens, capabilities.vocabulary):
        return refused(request.id, param, wrong)
    if len(tokens) > longest:
        message = f"{subject} {len(tokens)} tokens, but a text may have at most {longest} here"
        return _overflow(request.id, param, message, len(tokens), longest)
    return None


def _overflow(request: str, param: str, message: str, n_prompt: int, n_ctx: int) -> Failed:
    return Failed(
        id=request,
        code="context_length_exceeded",
        message=message,
        param=param,
        prompt_tokens=n_prompt,
        context_length=n_ctx,
    )


def within(request: Embed, tokens: Sequence[int], longest: int, closing: Sequence[int]) -> list[int]:
    """Returns a text's tokens, cut to ``longest`` if the request allows it. ``closing`` tokens at the end stay."""
    if not request.truncate or len(tokens) <= longest:
        return list(tokens)
    kept = list(closing)[-longest:] if closing and list(tokens[-len(closing) :]) == list(closing) else []
    return [*tokens[: longest - len(kept)], *kept]


def tokenized(
    request: Tokenize, tokens: Sequence[int], vocabulary: int, pieces: Vocabulary
) -> Iterator[Tokenized | Failed]:
    """Yields the reply in parts, or a refusal. ``vocabulary`` is the number of the model's tokens."""
    if len(tokens) > MAX_TOKENIZED:
        yield refused(request.id, "prompt", f"it has {len(tokens)} tokens; at most {MAX_TOKENIZED} can be told")
        return
    if wrong := _unknown(tokens, vocabulary):
        yield refused(request.id, "prompt", wrong)
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


def refused(request: str, param: str, reason: str) -> Failed:
    """Returns the refusal of a request because of its field ``param``."""
    return Failed(id=request, code="invalid_request", message=f"{param}: {reason}", param=param)


def length_limit(request: Generate, n_prompt: int, n_ctx: int) -> int:
    """Returns the length, prompt and output together, at which the sequence ends with finish reason "length"."""
    return n_ctx if request.max_tokens is None else min(n_ctx, n_prompt + request.max_tokens)


@dataclass(frozen=True, slots=True)
class Resumed:
    """The state of a sequence after the tokens that were delivered before this runner got it."""

    text: TextStream
    """Has had these tokens, so it holds back the same text as the runner before."""
    ended: FinishReason | None
    """Not None if nothing is left to generate: the runner before died between the last token and ``Finished``."""


def resume(request: Generate, n_prompt: int, n_limit: int, output: Vocabulary) -> Resumed:
    """Repeats the effect of the delivered tokens. The text that they released was delivered with them.

    A request with ``max_tokens`` 0 has not ended: its prompt is still to be computed.
    """
    text = TextStream(request.stop, request.min_tokens, request.stop_tokens, show_stop=request.show_stop)
    ended: FinishReason | None = None
    for token in request.delivered:
        text.take(token, output, show_special=request.show_special)
        if output.is_eog(token):
            ended = "stop"
    if text.stopped:
        ended = "stop"
    elif ended is None and request.delivered and n_prompt + len(request.delivered) >= n_limit:
        ended = "length"
    return Resumed(text, ended)
