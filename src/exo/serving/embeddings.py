"""Vectors of texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from exo.serving.errors import RequestError
from exo.serving.failover import LoadedRunner
from exo.serving.request import RequestedModel
from exo.serving.unary import ask
from exo.worker.protocol.commands import Embed, Text
from exo.worker.protocol.events import Embedded

if TYPE_CHECKING:
    from exo.serving.app_state import Services


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors in the order of the inputs, the tokens of all inputs, and the runner that was found last."""

    vectors: list[list[float]]
    tokens: int
    runner: LoadedRunner


async def make_embeddings(
    services: "Services",
    model: RequestedModel,
    inputs: Sequence[str | list[int]],
    *,
    field: str = "input",
    dimensions: int | None = None,
    truncate: bool = False,
    keep_seconds: float | None = None,
) -> Embeddings:
    """Makes a vector of length 1 of each text or list of token ids. Raises ``ServingError``.

    Special tokens in a text are ordinary text. ``field`` is the client's name of the inputs. Each vector is cut to
    its first ``dimensions`` components, if that is given. ``keep_seconds`` is as in ``ask``.
    """
    request = uuid4().hex
    commands = [
        Embed(
            id=f"embd-{request}-{at}",
            prompt=(Text(text=each),) if isinstance(each, str) else tuple(each),
            truncate=truncate,
        )
        for at, each in enumerate(inputs)
    ]
    answered = await ask(
        services,
        model,
        commands,
        needs={"embeddings": "model"},
        params={"prompt": field},
        keep_seconds=keep_seconds,
    )
    embedded = [answer for answer in answered.answers if isinstance(answer, Embedded)]
    vectors = [_shortened(answer.vector, dimensions) for answer in embedded]
    return Embeddings(vectors, sum(answer.usage.prompt_tokens for answer in embedded), answered.runner)


def _shortened(vector: Sequence[float], dimensions: int | None) -> list[float]:
    """The first components, made length 1 again. Raises ``ServingError`` if the vector has fewer."""
    if dimensions is None:
        return list(vector)
    if dimensions > len(vector):
        message = f"dimensions: vectors of this model have {len(vector)} components (got {dimensions})"
        raise RequestError(message, code="invalid_value", param="dimensions")
    kept = vector[:dimensions]
    length = math.hypot(*kept) or 1.0
    return [component / length for component in kept]
