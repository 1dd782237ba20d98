"""llama.cpp as an engine of upstream's runner process. The model is in a process of its own, see ``child.py``."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Generator, Iterator
from queue import Empty
from typing import BinaryIO, final

from exo.chat.output.registry import OutputFormat, OutputParser, output_format
from exo.chat.sandbox_pool import SandboxBusyError
from exo.chat.template.reasoning import effort_variables, empty_reasoning
from exo.chat.template.renderer import (
    ConversationRefusedError,
    PromptTooLongError,
    TemplateError,
    TemplateWorker,
    VariableRefusedError,
    chat_prompt,
)
from exo.chat.template.special_tokens import NoncharacterError
from exo.download.download_utils import EXO_MODELS_DIRS, EXO_MODELS_READ_ONLY_DIRS
from exo.shared.types.chunks import Chunk, ErrorChunk, PrefillProgressChunk
from exo.shared.types.common import ModelId
from exo.shared.types.tasks import CANCEL_ALL_TASKS, GenerationTask, TaskId, TextGeneration
from exo.shared.types.text_generation import TextGenerationTaskParams
from exo.shared.types.worker.instances import BoundInstance, LlamaCppInstance
from exo.shared.types.worker.runner_response import CancelledResponse, FinishedResponse, ModelLoadingResponse
from exo.utils.channels import MpReceiver
from exo.worker.disaggregated.server import PrefillRequest
from exo.worker.engines.base import Builder, Engine
from exo.worker.engines.llama_cpp import mapping
from exo.worker.engines.llama_cpp.child import Child, LlamaCppError
from exo.worker.protocol.commands import Cancel, Load, Text
from exo.worker.protocol.events import Capabilities, Deltas, Event, Failed, Finished, PrefillProgress, Status

Output = tuple[TaskId, Chunk | CancelledResponse | FinishedResponse]
STEP_SECONDS = 0.05
"""How long a step waits for an event. Upstream calls steps in a loop and looks for cancellations between them."""
START_SECONDS, SILENCE_SECONDS = 30.0, 120.0
_REFUSALS = (
    *(ValueError, TemplateError, ConversationRefusedError, PromptTooLongError, NoncharacterError, SandboxBusyError),
)


@final
class LlamaCppBuilder(Builder):
    """Starts the runner and loads a model into it."""

    def __init__(self, model_id: ModelId, cancel_receiver: MpReceiver[TaskId]) -> None:
        self._model_id, self._cancel_receiver = model_id, cancel_receiver
        self._child: Child | None = None
        self._capabilities: Capabilities | None = None

    def connect(self, bound_instance: BoundInstance) -> None:
        """Raises NotImplementedError: an instance has one node."""
        raise NotImplementedError("an instance of llama.cpp has one node")

    def load(self, bound_instance: BoundInstance) -> Generator[ModelLoadingResponse]:
        """Yields progress in layers. Raises LlamaCppError."""
        instance, card = bound_instance.instance, bound_instance.bound_shard.model_card
        assert isinstance(instance, LlamaCppInstance)
        if not card.files:
            raise LlamaCppError(f"the model card of {card.model_id} names no GGUF file in `files`")
        self._child = child = Child()
        while child.wait(START_SECONDS) != Status(state="Idle"):
            pass
        directories = tuple(str(each) for each in (*EXO_MODELS_READ_ONLY_DIRS, *EXO_MODELS_DIRS))
        further = json.loads(os.environ.get("EXO_LLAMA_CPP_TABLE") or "{}")
        table = {"repo": str(card.model_id), "file": card.files[0], **further}
        backend = instance.backend.value
        child.send(Load(model_id=str(card.model_id), backend=backend, table=table, directories=directories))
        loaded = -1
        while self._capabilities is None:
            match child.wait(SILENCE_SECONDS):
                case Status(capabilities=Capabilities() as capabilities):
                    self._capabilities = capabilities
                case Status(state="Loading", layers_loaded=done, total_layers=total) if total:
                    if loaded < (loaded := card.n_layers * done // total):
                        yield ModelLoadingResponse(layers_loaded=loaded, total=card.n_layers)
                case _:
                    pass

    def build(self) -> Engine:
        """Returns the engine of the loaded model."""
        assert self._child is not None
        assert self._capabilities is not None
        return LlamaCppEngine(self._model_id, self._cancel_receiver, self._child, self._capabilities)

    def close(self) -> None:
        """Ends the runner."""
        if self._child is not None:
            self._child.close()


@final
class LlamaCppEngine(Engine):
    """Requests of one model. A request that fails ends alone; the end of the process ends all of them."""

    def __init__(
        self, model_id: ModelId, cancel_receiver: MpReceiver[TaskId], child: Child, capabilities: Capabilities
    ) -> None:
        self._model_id, self._cancel_receiver, self._child = model_id, cancel_receiver, child
        self._capabilities = capabilities
        self._cancelled_tasks: set[TaskId] = set()
        self._replies: dict[TaskId, mapping.Reply] = {}
        self._refused: list[Output] = []
        self._templates = TemplateWorker()
        self._loop = asyncio.new_event_loop()
        # A daemon, or the process of a failed runner would not end.
        threading.Thread(target=self._loop.run_forever, name="templates", daemon=True).start()

    def warmup(self) -> None:
        """Does nothing: the runner has warmed up before it was ready."""

    def submit(self, task: GenerationTask) -> None:
        """Sends a request to the runner. A request that cannot be served gets an error in the next step."""
        assert isinstance(task, TextGeneration)
        self._cancelled_tasks.discard(CANCEL_ALL_TASKS)
        params = task.task_params
        try:
            prompt, parser, form = self._prepared(params)
            command = mapping.generate(str(task.task_id), params, prompt, form)
        except _REFUSALS as error:
            self._refused += self._error(task.task_id, str(error))
            return
        self._replies[task.task_id] = mapping.Reply(self._model_id, parser, time.perf_counter())
        self._child.send(command)

    def step(self) -> Iterator[Output]:
        """Yields what has come since the last step. Raises LlamaCppError if the process has ended."""
        refused, self._refused = self._refused, []
        yield from refused
        yield from self._cancel()
        seconds = STEP_SECONDS
        try:
            while True:
                yield from self._outputs(self._child.get(seconds))
                seconds = 0.0
        except Empty:
            return

    def close(self) -> None:
        """Ends the runner and the processes of the chat template."""
        asyncio.run_coroutine_threadsafe(self._templates.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._child.close()

    def serve_prefill(self, request: PrefillRequest, wfile: BinaryIO) -> None:
        """Raises NotImplementedError: a KV cache of llama.cpp's suits no other engine."""
        raise NotImplementedError("llama.cpp does not hand its KV cache to another engine")

    def _prepared(self, params: TextGenerationTaskParams) -> tuple[tuple[Text, ...], OutputParser | None, OutputFormat]:
        source, tools = self._capabilities.template(tools=bool(params.tools)), mapping.tools(params)
        if source is None:
            raise ValueError("this model has no chat template")
        if params.images:
            raise ValueError("this engine reads no pictures")
        form, effort, said = output_format(source), mapping.effort(params), mapping.conversation(params)
        continues = bool(said) and said[-1].get("role") == "assistant"
        definitions = [tool.definition() for tool in tools]

        async def render(variables: mapping.Variables) -> tuple[Text, ...]:
            return await chat_prompt(
                *(self._templates, self._capabilities, said),
                tools=definitions,
                variables=variables,
                continue_final_message=continues,
            )

        prompt: tuple[Text, ...] = ()
        for variables in effort_variables(source, effort) if effort is not None else [{}]:
            try:
                prompt = asyncio.run_coroutine_threadsafe(render(variables), self._loop).result()
                break
            except VariableRefusedError:
                continue
        text = "".join(each.text for each in prompt)
        if effort == "none" and not continues and (closed := empty_reasoning(form, text)):
            prompt, text = (*prompt, Text(text=closed, special=True)), text + closed
        parser = form.parser(tools=tools, in_reasoning=form.starts_in_reasoning(text))
        return prompt, None if params.bench else parser, form

    def _cancel(self) -> Iterator[Output]:
        self._cancelled_tasks.update(self._cancel_receiver.collect())
        for task in [each for each in self._replies if self.should_cancel(each)]:
            self._child.send(Cancel(id=str(task)))
            del self._replies[task]
            yield task, CancelledResponse()
        self._cancelled_tasks.clear()

    def _outputs(self, event: Event) -> Iterator[Output]:
        now = time.perf_counter()
        match event:
            case Deltas(items=items):
                for item in items:
                    if (reply := self._replies.get(TaskId(item.id))) is not None:
                        yield from ((TaskId(item.id), chunk) for chunk in reply.delta(item, now))
            case PrefillProgress(id=task, processed=done, total=total) if TaskId(task) in self._replies:
                progress = PrefillProgressChunk(model=self._model_id, processed_tokens=done, total_tokens=total)
                yield TaskId(task), progress
            case Finished(id=task) if (reply := self._replies.pop(TaskId(task), None)) is not None:
                chunks = reply.finished(event, now, self._capabilities.model_bytes)
                yield from ((TaskId(task), chunk) for chunk in chunks)
                yield TaskId(task), FinishedResponse()
            case Failed(id=str(task), message=message) if self._replies.pop(TaskId(task), None) is not None:
                yield from self._error(TaskId(task), message)
            case _:
                pass

    def _error(self, task: TaskId, message: str) -> list[Output]:
        return [(task, ErrorChunk(model=self._model_id, error_message=message)), (task, FinishedResponse())]
