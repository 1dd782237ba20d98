"""Texts to vectors: the network without its head, one text after another, in a KV cache that goes with the text.

A text is computed in chunks, as prompts are, so that streams go on in between; what the chunks pool to is added up.
"""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from pydantic import JsonValue, TypeAdapter, ValidationError

from exo.worker.messages import Embedded, Failed, Usage
from exo.worker.runner_mlx.kv_cache import KVCache
from exo.worker.runner_mlx.model import Model, wait_for
from exo.worker.runner_mlx.options import LoadError, MlxOptions, Pooling

LONGEST = 2048
"""Tokens of a text, where the card does not say."""

_CONFIG: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])
_MODES: dict[str, Pooling] = {
    "mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last",
}  # fmt: skip
"""Sentence Transformers' names: of a flag that is set, after "pooling_mode_", or the value of "pooling_mode"."""


@dataclass(frozen=True, slots=True)
class Job:
    """A text to be made a vector."""

    id: str
    tokens: list[int]


@dataclass(slots=True)
class _Text:
    """The text in work, as far as it is ``done``."""

    job: Job
    cache: KVCache
    pooled: mx.array
    """What its tokens have pooled to so far, shape (hidden size,), float32."""
    done: int = 0


@dataclass(slots=True)
class Embedder:
    """The texts that wait and the one in work. Belongs to the engine's thread, but for reading the counts."""

    model: Model
    pooling: Pooling
    longest: int
    """Tokens that a text may have."""
    chunk: int
    waiting: deque[Job] = field(default_factory=deque[Job])
    _text: _Text | None = None

    def __bool__(self) -> bool:
        return bool(self.waiting) or self._text is not None

    @property
    def n_active(self) -> int:
        """Texts in work."""
        return int(self._text is not None)

    def jobs(self) -> list[Job]:
        """All that are not answered."""
        return [*([] if self._text is None else [self._text.job]), *self.waiting]

    def remove(self, request: str) -> bool:
        """Drops a request; false if it is not here, or answered."""
        if self._text is not None and self._text.job.id == request:
            self._text = None
            return True
        job = next((job for job in self.waiting if job.id == request), None)
        if job is not None:
            self.waiting.remove(job)
        return job is not None

    def step(self) -> list[Embedded | Failed]:
        """Computes one chunk of a text; its answer if it ends with it. Waits for the device."""
        text = self._text
        if text is None:
            job = self.waiting.popleft()
            cache = KVCache(self.model.windows, 1, len(job.tokens))
            self._text = text = _Text(job, cache, mx.zeros(1))
        start, stop = text.done, min(text.done + self.chunk, len(text.job.tokens))
        states = self.model.states(mx.array([text.job.tokens[start:stop]]), text.cache, start)[0].astype(mx.float32)
        match self.pooling:
            case "mean":  # the sum will do, as the vector's length is made 1 anyway
                text.pooled = text.pooled + states.sum(axis=0)
            case "cls":
                text.pooled = states[0] if start == 0 else text.pooled
            case "last":
                text.pooled = states[-1]
        wait_for(text.pooled, text.cache.arrays())
        text.done = stop
        if stop < len(text.job.tokens):
            return []
        self._text = None
        return [_answer(text.job, np.array(text.pooled, np.float64))]


def choose_pooling(options: MlxOptions, folder: Path) -> Pooling:
    """The card's, else what the folder says in Sentence Transformers' file, else mean. Raises LoadError."""
    path = folder / "1_Pooling" / "config.json"
    if options.pooling is not None or not path.exists():
        return options.pooling or "mean"
    try:
        config = _CONFIG.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise LoadError("model_load_failed", f"{path} cannot be read: {error}") from error
    modes = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True and "_mode_" in key]
    modes += [mode] if isinstance(mode := config.get("pooling_mode"), str) else []
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    message = f"{path} asks for the pooling {' and '.join(modes) or 'none'}; [mlx] pooling may be mean, cls or last"
    raise LoadError("model_load_failed", message)


def _answer(job: Job, pooled: npt.NDArray[np.float64]) -> Embedded | Failed:
    length = float(np.linalg.norm(pooled))
    if not 0 < length < np.inf:
        message = "the model computed a vector for this text that has a number that is none, or no length"
        return Failed(id=job.id, code="engine_error", message=message)
    vector = cast(list[float], (pooled / length).tolist())
    return Embedded(id=job.id, vector=tuple(vector), usage=Usage(prompt_tokens=len(job.tokens), completion_tokens=0))
