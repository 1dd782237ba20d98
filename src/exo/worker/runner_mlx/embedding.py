"""Computes vectors of texts with the network without its head, one text at a time, each in a KV cache of its own.

A text is computed in chunks like a prompt, so that streams continue in between. The chunks' pooled values are added up.
"""

from collections import deque
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from exo.worker.protocol.events import Embedded, Failed, Ranked
from exo.worker.runner_common.commands import TextJob, answer
from exo.worker.runner_common.hf_embedding import Pooling
from exo.worker.runner_mlx.kv_cache import KVCache
from exo.worker.runner_mlx.model import MlxModel, wait_for


@dataclass(slots=True)
class _CurrentText:
    """The text being computed, of which ``done`` tokens are computed."""

    job: TextJob
    cache: KVCache
    pooled: mx.array
    """The pooled value so far, shape (hidden size,), float32."""
    done: int = 0


@dataclass(slots=True)
class MlxEmbedder:
    """The waiting texts and the current one. Other threads than the engine's may read the counts."""

    model: MlxModel
    pooling: Pooling
    longest: int
    """The most tokens of a text."""
    chunk: int
    waiting: deque[TextJob] = field(default_factory=deque[TextJob])
    _text: _CurrentText | None = None

    def __bool__(self) -> bool:
        return bool(self.waiting) or self._text is not None

    @property
    def n_active(self) -> int:
        """The number of texts being computed."""
        return int(self._text is not None)

    def remove(self, request: str) -> bool:
        """Drops a request. Returns false if it is unknown or answered."""
        if self._text is not None and self._text.job.id == request:
            self._text = None
            return True
        job = next((job for job in self.waiting if job.id == request), None)
        if job is not None:
            self.waiting.remove(job)
        return job is not None

    def step(self) -> list[Embedded | Ranked | Failed]:
        """Computes one chunk of a text, and returns its answer with the last chunk. Waits for the device."""
        text = self._text
        if text is None:
            job = self.waiting.popleft()
            cache = KVCache(self.model.windows, 1, len(job.tokens))
            self._text = text = _CurrentText(job, cache, mx.zeros(1))
        start, stop = text.done, min(text.done + self.chunk, len(text.job.tokens))
        states = self.model.states(mx.array([text.job.tokens[start:stop]]), text.cache, start)[0].astype(mx.float32)
        match self.pooling:
            case "mean":  # the sum suffices, because the vector is normalised
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
        return [answer(text.job, np.array(text.pooled, np.float64))]
