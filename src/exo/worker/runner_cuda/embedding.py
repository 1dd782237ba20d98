"""Computes vectors and scores of texts in a second context over the model's weights, created with the first text.

With causal attention, texts are computed in chunks like prompts, and the pooled values of the chunks are added up.
Streams continue in between, and the logits, which llama.cpp computes for every token to embed, stay small. An encoder's
tokens attend to the whole text, so a text is one batch.
"""

from collections import deque
from dataclasses import dataclass, field

import llama_cpp
import numpy as np
import numpy.typing as npt

from exo.worker.protocol.events import (
    Embedded,
    Failed,
    Ranked,
)
from exo.worker.runner_common.commands import TextJob, answer
from exo.worker.runner_common.load_error import LoadError
from exo.worker.runner_common.memory_plan import LONGEST_TEXT
from exo.worker.runner_cuda.loading.llama_log import Log
from exo.worker.runner_cuda.loading.model import Model
from exo.worker.runner_cuda.loading.options import CudaOptions, Pooling
from exo.worker.runner_cuda.pooled_context import POOLING, PooledContext, Vector

MOST_TEXTS = 64
"""The most texts computed together."""
LOGITS_BYTES = 256 << 20
"""The most bytes of one chunk's logits."""

RANKING_HEADS = ("cls.weight", "cls.output.weight")
"""A ranking model has at least one of these tensors."""

Integers = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Texts:
    """A group of texts that are computed together. In ``jobs``, None replaces a cancelled or answered one."""

    jobs: list[TextJob | None]
    pooled: npt.NDArray[np.float64]
    """The pooled values so far, shape (texts, size)."""
    tokens: Integers
    positions: Integers
    numbers: Integers
    """The index of each row's text."""
    ends: list[int]
    """The row after each text's last row."""
    done: int = 0

    @classmethod
    def of(cls, jobs: list[TextJob], size: int) -> "_Texts":
        lengths = [len(job.tokens) for job in jobs]
        return cls(
            jobs=[*jobs],
            pooled=np.zeros((len(jobs), size)),
            tokens=np.array([token for job in jobs for token in job.tokens], np.int32),
            positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            numbers=np.repeat(np.arange(len(jobs), dtype=np.int32), lengths),
            ends=[int(end) for end in np.cumsum(lengths)],
        )

    def fold(self, pooling: Pooling, number: int, count: int, value: Vector) -> None:
        """Adds the pooled value of ``count`` rows of a text. A mean stays a sum, because vectors are normalised."""
        begun = self.ends[number] - int((self.numbers == number).sum()) < self.done
        match pooling:
            case "mean":
                self.pooled[number] += count * value.astype(np.float64)
            case "cls":
                self.pooled[number] = self.pooled[number] if begun else value
            case "last" | "rank":
                self.pooled[number] = value


@dataclass(slots=True)
class Embedder:
    """The waiting texts and the current group. Other threads than the engine's may read ``longest`` and the counts."""

    model: Model
    options: CudaOptions
    causal: bool
    """False for an encoder, whose tokens attend to the whole text."""
    n_ctx: int
    """The context length of a slot."""
    chunk: int
    log: Log
    pooling: Pooling = field(init=False)
    longest: int = field(init=False)
    """The most tokens of a text."""
    waiting: deque[TextJob] = field(default_factory=deque[TextJob])
    n_threads: int = 1
    _n_rows: int = field(init=False)
    _n_texts: int = field(init=False)
    _context: PooledContext | None = None
    _texts: _Texts | None = None

    def __post_init__(self) -> None:
        model, options = self.model, self.options
        self.pooling = options.pooling or _stored_pooling(model)
        usual = self.n_ctx if self.causal else options.n_ctx or LONGEST_TEXT
        self.longest = min(model.n_ctx_train, options.embedding_ctx or min(usual, LONGEST_TEXT))
        narrow = max(32, LOGITS_BYTES // (4 * model.n_vocab))
        self._n_rows = min(self.longest, self.chunk, narrow) if self.causal else self.longest
        has_state = llama_cpp.llama_model_is_recurrent(model.handle) or llama_cpp.llama_model_is_hybrid(model.handle)
        self._n_texts = 1 if has_state or options.exact else min(MOST_TEXTS, self._n_rows)

    def __bool__(self) -> bool:
        return bool(self.waiting) or self._texts is not None

    @property
    def n_active(self) -> int:
        """The number of unanswered texts in the current group."""
        texts = self._texts
        return 0 if texts is None else sum(job is not None for job in texts.jobs)

    def remove(self, request: str) -> bool:
        """Drops a request. Returns false if it is unknown or answered."""
        for job in self.waiting:
            if job.id == request:
                self.waiting.remove(job)
                return True
        jobs = [] if self._texts is None else self._texts.jobs
        for number, job in enumerate(jobs):
            if job is not None and job.id == request:
                jobs[number] = None
                return True
        return False

    def open(self) -> PooledContext:
        """Returns the context, which is created by the first call. Raises LoadError."""
        if self._context is None:
            n_cells, n_rows = self.longest, self._n_rows
            self._context = PooledContext(
                self.model, self.options, self.pooling, n_cells, n_rows, self._n_texts, self.log
            )
        return self._context

    def step(self) -> list[Embedded | Ranked | Failed]:
        """Computes one batch, and returns the answers of the texts that end in it. Raises EngineError."""
        try:
            context = self.open()
        except LoadError as error:
            jobs, self.waiting = self.waiting, deque[TextJob]()
            code = "out_of_memory" if error.code == "out_of_memory" else "engine_error"
            return [Failed(id=job.id, code=code, message=str(error)) for job in jobs]
        if self._texts is None:
            self._texts = _Texts.of(self._next_jobs(), context.size)
        answers = self._compute(context, self._texts) if self.n_active else []
        if not self.n_active:
            context.clear(data=not np.isfinite(self._texts.pooled).all())
            self._texts = None
        return answers

    def _next_jobs(self) -> list[TextJob]:
        """Takes the next jobs in order, at least one. An encoder's batch exceeds a chunk only for a longer text."""
        room = self.longest if self.causal else min(self.longest, self.chunk)
        jobs = [self.waiting.popleft()]
        room -= len(jobs[0].tokens)
        while self.waiting and len(jobs) < self._n_texts and len(self.waiting[0].tokens) <= room:
            jobs.append(self.waiting.popleft())
            room -= len(jobs[-1].tokens)
        return jobs

    def _compute(self, context: PooledContext, texts: _Texts) -> list[Embedded | Ranked | Failed]:
        start, stop = texts.done, min(texts.done + self._n_rows, len(texts.tokens))
        batch, rows, n_rows = context.batch, slice(start, stop), stop - start
        batch.tokens[:n_rows] = texts.tokens[rows]
        batch.positions[:n_rows] = texts.positions[rows]
        batch.slots[:n_rows] = texts.numbers[rows]
        context.use_threads(self.n_threads)
        context.compute(n_rows)
        numbers, counts = np.unique(texts.numbers[rows], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            texts.fold(self.pooling, number, count, context.pooled(number))
        texts.done = stop
        answers: list[Embedded | Ranked | Failed] = []
        for number, end in enumerate(texts.ends):
            job = texts.jobs[number]
            if start < end <= stop and job is not None:
                answers.append(answer(job, texts.pooled[number]))
                texts.jobs[number] = None
        return answers

    def free(self) -> None:
        """Frees the context. Call it before the model is freed."""
        if self._context is not None:
            self._context.free()


def _stored_pooling(model: Model) -> Pooling:
    """Returns the pooling that the file states; "mean" if it states none, as in a model for generation."""
    stored = model.metadata("{arch}.pooling_type")
    names: dict[str, Pooling] = {str(number): name for name, number in POOLING.items()}
    return names.get(stored or "", "mean")
