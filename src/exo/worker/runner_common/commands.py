"""The commands that an engine's thread gets from the front end, and the queue that carries them."""

from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt

from exo.worker.protocol.commands import Cancel, Cores, Shutdown
from exo.worker.protocol.events import Embedded, Failed, Ranked, Usage
from exo.worker.runner_common.output_processor import Cancelled, Emitter

SequenceT = TypeVar("SequenceT")
"""An engine's own type of sequence."""


@dataclass(frozen=True, slots=True)
class TextJob:
    """A text that is to become a vector or, together with its query, a score."""

    id: str
    tokens: list[int]
    answer: Literal["vector", "score"] = "vector"


def answer(job: TextJob, pooled: npt.NDArray[np.float64]) -> Embedded | Ranked | Failed:
    """Returns a text's pooled vector, shape (size,), scaled to length 1, or its score, shape (1,).

    A result with NaN or infinity, and a vector of zeros, is a failure.
    """
    usage = Usage(prompt_tokens=len(job.tokens), completion_tokens=0)
    length = float(np.linalg.norm(pooled))
    if job.answer == "score" and np.isfinite(length):
        return Ranked(id=job.id, score=float(pooled[0]), usage=usage)
    if job.answer == "vector" and 0 < length < np.inf:
        return Embedded(id=job.id, vector=tuple(cast(list[float], (pooled / length).tolist())), usage=usage)
    message = "the model's result for this text contains NaN or infinity, or is a zero vector"
    return Failed(id=job.id, code="engine_error", message=message)


class Commands(Generic[SequenceT]):
    """The commands of one engine: any thread puts them, the engine's thread handles them between two steps."""

    def __init__(
        self,
        emitter: Emitter,
        *,
        add: Callable[[SequenceT], None],
        add_text: Callable[[TextJob], None],
        remove: Callable[[str], bool],
        use_cores: Callable[[int], None] = lambda _: None,
    ) -> None:
        """The arguments are the engine's operations, called in the engine's thread.

        ``remove`` drops a request and frees its slot; false if the engine does not have it. ``use_cores`` limits the
        CPU cores; an engine that cannot change their number needs none.
        """
        self._queue: SimpleQueue[SequenceT | TextJob | Cancel | Cores | Shutdown] = SimpleQueue()
        self._emitter = emitter
        self._add = add
        self._add_text = add_text
        self._remove = remove
        self._use_cores = use_cores

    def put(self, command: SequenceT | TextJob | Cancel | Cores | Shutdown) -> None:
        """Queues a command; never blocks."""
        self._queue.put(command)

    def handle(self, *, wait: bool, seconds: float | None = None) -> bool:
        """Handles all queued commands. False after ``Shutdown``.

        With ``wait``, waits for the first one, at most ``seconds`` long if that is given.
        """
        while True:
            try:
                command = self._queue.get(block=wait, timeout=seconds)
            except Empty:
                return True
            wait = False
            match command:
                case TextJob():
                    self._add_text(command)
                case Cancel():
                    # The emitter ignores the news if it has ended the request itself, at a stop string.
                    if self._remove(command.id):
                        self._emitter.put(Cancelled(command.id))
                case Cores():
                    self._use_cores(command.count)
                case Shutdown():
                    return False
                case _:
                    self._add(command)
