from dataclasses import dataclass

from exo.shared.types.text_generation import TextGenerationTaskParams


class TaskId(str): ...


CANCEL_ALL_TASKS = TaskId("CANCEL_ALL_TASKS")


@dataclass
class TextGeneration:
    task_id: TaskId
    task_params: TextGenerationTaskParams


GenerationTask = TextGeneration
