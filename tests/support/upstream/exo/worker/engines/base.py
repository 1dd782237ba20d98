from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from typing import BinaryIO

from exo.shared.types.chunks import Chunk
from exo.shared.types.tasks import CANCEL_ALL_TASKS, GenerationTask, TaskId
from exo.shared.types.worker.instances import BoundInstance
from exo.shared.types.worker.runner_response import CancelledResponse, FinishedResponse, ModelLoadingResponse
from exo.worker.disaggregated.server import PrefillRequest


class Engine(ABC):
    _cancelled_tasks: set[TaskId]

    def should_cancel(self, task: TaskId) -> bool:
        return bool({task, CANCEL_ALL_TASKS} & self._cancelled_tasks)

    @abstractmethod
    def warmup(self) -> None: ...

    @abstractmethod
    def submit(self, task: GenerationTask) -> None: ...

    @abstractmethod
    def step(self) -> Iterable[tuple[TaskId, Chunk | CancelledResponse | FinishedResponse]]: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def serve_prefill(self, request: PrefillRequest, wfile: BinaryIO) -> None: ...


class Builder(ABC):
    @abstractmethod
    def connect(self, bound_instance: BoundInstance) -> None: ...

    @abstractmethod
    def load(self, bound_instance: BoundInstance) -> Generator[ModelLoadingResponse]: ...

    @abstractmethod
    def build(self) -> Engine: ...

    @abstractmethod
    def close(self) -> None: ...
