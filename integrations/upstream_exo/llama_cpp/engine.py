"""llama.cpp as an engine of upstream's runner process. The model is in a process of its own, see ``child.py``."""

import asyncio
import json
import os
import time
from collections.abc import Generator, Iterator
from typing import BinaryIO, final

from exo.chat.output.registry import OutputFormat, OutputParser, output_format
from exo.chat.sandbox_pool import SandboxBusyError
from exo.chat.template.reasoning import reasoning_prompt
from exo.chat.template.renderer import PromptError, TemplateWorker
from exo.download.download_utils import EXO_MODELS_DIRS, EXO_MODELS_READ_ONLY_DIRS
from exo.shared.types.chunks import Chunk, ErrorChunk
from exo.shared.types.common import ModelId
from exo.shared.types.tasks import CANCEL_ALL_TASKS, GenerationTask, TaskId, TextGeneration
from exo.shared.types.text_generation import TextGenerationTaskParams, resolve_reasoning_params
from exo.shared.types.worker.instances import BoundInstance, LlamaCppInstance
from exo.shared.types.worker.runner_response import CancelledResponse, FinishedResponse, ModelLoadingResponse
from exo.utils.channels import MpReceiver
from exo.worker.disaggregated.server import PrefillRequest
from exo.worker.engines.base import Builder, Engine
from exo.worker.engines.llama_cpp import mapping
from exo.worker.engines.llama_cpp.child import Child, LlamaCppError
from exo.worker.protocol.commands import Cancel, Load, Text
from exo.worker.protocol.events import Capabilities, Deltas, Event, Failed, Finished, Status

Prepared = tuple[tuple[Text, ...], OutputParser | None, OutputFormat]
Output = tuple[TaskId, Chunk | CancelledResponse | FinishedResponse]
STEP_SECONDS = 0.05
"""How long a step waits for an event. Upstream calls steps in a loop and looks for cancellations between them."""
SILENCE_SECONDS = 120.0
"""How long the runner may be silent while it loads. It sends heartbeats."""


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
        directories = tuple(str(each) for each in (*EXO_MODELS_READ_ONLY_DIRS, *EXO_MODELS_DIRS))
        further = json.loads(os.environ.get("EXO_LLAMA_CPP_TABLE") or "{}")
        table = {"repo": str(card.model_id), "file": card.files[0], **further}
        backend, model_id = instance.backend.value, str(card.model_id)
        self._child = child = Child()
        child.send(Load(model_id=model_id, backend=backend, table=table, directories=directories))
        loaded = -1
        while self._capabilities is None:
            match child.get(SILENCE_SECONDS):
                case None:
                    raise LlamaCppError(f"llama.cpp has been silent for {SILENCE_SECONDS:g} s")
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
        self._templates, self._loop = TemplateWorker(), asyncio.Runner()

    def warmup(self) -> None:
        """Does nothing: the runner has warmed up before it was ready."""

    def submit(self, task: GenerationTask) -> None:
        """Sends a request to the runner. A request that cannot be served gets an error in the next step."""
        assert isinstance(task, TextGeneration)
        self._cancelled_tasks.discard(CANCEL_ALL_TASKS)
        name, params = task.task_id, task.task_params
        try:
            prompt, parser, form = self._loop.run(self._prepared(params))
            command = mapping.generate(str(name), params, prompt, form)
        except (ValueError, PromptError, SandboxBusyError) as error:
            refusal = ErrorChunk(model=self._model_id, error_message=str(error))
            self._refused += [(name, refusal), (name, FinishedResponse())]
            return
        self._replies[name] = mapping.Reply(self._model_id, parser, self._capabilities.model_bytes, time.perf_counter())
        self._child.send(command)

    def step(self) -> Iterator[Output]:
        """Yields what has come since the last step. Raises LlamaCppError if the process has ended."""
        refused, self._refused = self._refused, []
        yield from refused
        yield from self._cancel()
        event = self._child.get(STEP_SECONDS)
        while event is not None:
            yield from self._outputs(event)
            event = self._child.get(0.0)

    def close(self) -> None:
        """Ends the runner and the processes of the chat template."""
        self._loop.run(self._templates.aclose())
        self._loop.close()
        self._child.close()

    def serve_prefill(self, request: PrefillRequest, wfile: BinaryIO) -> None:
        """Raises NotImplementedError: a KV cache of llama.cpp's suits no other engine."""
        raise NotImplementedError("llama.cpp does not hand its KV cache to another engine")

    async def _prepared(self, params: TextGenerationTaskParams) -> Prepared:
        source, tools = self._capabilities.template(tools=bool(params.tools)), mapping.tools(params)
        if source is None:
            raise ValueError("this model has no chat template")
        if params.images:
            raise ValueError("this engine reads no pictures")
        form, said = output_format(source), mapping.conversation(params)
        effort, _ = resolve_reasoning_params(params.reasoning_effort, params.enable_thinking)
        prompt = await reasoning_prompt(
            *(self._templates, self._capabilities, said, form, effort),
            tools=[tool.definition() for tool in tools],
            continue_final_message=bool(said) and said[-1].get("role") == "assistant",
        )
        inside = form.starts_in_reasoning("".join(each.text for each in prompt.texts))
        parser = None if params.bench else form.parser(tools=tools, in_reasoning=inside)
        return prompt.texts, parser, form

    def _cancel(self) -> Iterator[Output]:
        self._cancelled_tasks.update(self._cancel_receiver.collect())
        for task in [each for each in self._replies if self.should_cancel(each)]:
            self._child.send(Cancel(id=str(task)))
            del self._replies[task]
            yield task, CancelledResponse()
        self._cancelled_tasks.clear()

    def _outputs(self, event: Event) -> Iterator[Output]:
        now = time.perf_counter()
        for each in event.items if isinstance(event, Deltas) else (event,):
            if not isinstance(each, mapping.RequestEvent):
                continue
            task = TaskId(each.id or "")
            if (reply := self._replies.get(task)) is not None:
                yield from ((task, chunk) for chunk in reply.chunks(each, now))
                if isinstance(each, Finished | Failed):
                    del self._replies[task]
                    yield task, FinishedResponse()
