"""One request from route to last token, the same for every dialect: route, load, prompt, generate."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import anyio
from pydantic import JsonValue

from exo.api.errors import ApiError, from_failed
from exo.api.services import Services
from exo.chat.literal import NoncharacterError
from exo.chat.template import ConversationRefusedError, PromptTooLongError, TemplateError, chat_prompt
from exo.models.card import ModelCard
from exo.worker.messages import (
    Capabilities,
    Delta,
    Failed,
    Finished,
    Generate,
    PrefillProgress,
    SamplingParams,
    Status,
    Text,
    Usage,
)
from exo.worker.process import RunnerError, RunnerProcess

_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages from which a chat template makes the prompt; each has at least a ``role``."""

    messages: tuple[Mapping[str, JsonValue], ...]


Prompt = Conversation | str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client asks for, in no dialect. Choices are numbered prompt by prompt, ``n`` for each."""

    model: str
    """A model id or alias, perhaps with "@runner"."""
    prompts: tuple[Prompt, ...]
    prompt_field: str
    """What the client calls the prompt, for error messages."""
    n: int = 1
    sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    """Fields of ``SamplingParams`` that the client set; the card's defaults apply to the others."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    """Choice i of a prompt is generated with ``seed + i``. None: a random one."""
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False

    @property
    def choices(self) -> int:
        """Sequences to generate."""
        return len(self.prompts) * self.n


class Sink(Protocol):
    """Where the events of a request go. A method that waits holds up one sequence and not the others."""

    async def loading(self, status: Status) -> None:
        """The model is not loaded yet."""
        ...

    def serving(self, model_id: str, capabilities: Capabilities) -> None:
        """The model is loaded; comes before the first event."""
        ...

    async def event(self, choice: int, event: PrefillProgress | Delta | Finished) -> None:
        """The next event of a choice; the last is ``Finished``, with reason "stop" or "length"."""
        ...


class Generation:
    """One request on its way. ``headers`` are set, and ``routed`` with them, once the router has decided."""

    def __init__(self, services: Services, request: GenerationRequest, request_id: str) -> None:
        self.request = request
        self.id = request_id
        self.headers: Mapping[str, str] = {}
        self.routed = anyio.Event()
        self._services = services

    async def run(self, sink: Sink) -> None:
        """Returns when every choice is finished. Cancelling it cancels them. Raises ``ApiError``."""
        card, route = await self._services.choose(self.request.model)
        self.headers = {"x-exo-runner": route.runner, "x-exo-route": route.reason}
        self.routed.set()
        try:
            process = self._services.instances.acquire(route, card)
            capabilities = await self._loaded(process, sink)
        except RunnerError as error:
            raise self._failed(error.failed) from None
        sequences = await self._sequences(card, capabilities)
        sink.serving(card.model_id, capabilities)
        if failed := await _generate(process, sequences, sink):
            raise self._failed(failed)

    def _failed(self, failed: Failed) -> ApiError:
        return from_failed(failed, prompt_field=self.request.prompt_field)

    async def _loaded(self, process: RunnerProcess, sink: Sink) -> Capabilities:
        if process.capabilities is None:
            async for status in process.loading():
                await sink.loading(status)
        return await process.ready()

    async def _sequences(self, card: ModelCard, model: Capabilities) -> list[Generate]:
        request = self.request
        for token in request.logit_bias:
            _check_token(token, model, "logit_bias")
        defaults = card.sampling_defaults.model_dump(exclude_none=True, exclude={"thinking", "non_thinking"})
        chosen = {**defaults, **request.sampling, "logit_bias": request.logit_bias}
        first_seed = secrets.randbits(64) if request.seed is None else request.seed
        prompts = [await self._prompt(prompt, model) for prompt in request.prompts]
        return [
            Generate(
                id=f"{self.id}-{at * request.n + choice}",
                prompt=prompt,
                sampling=SamplingParams.model_validate({**chosen, "seed": (first_seed + choice) % _SEEDS}),
                stop=request.stop,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
            )
            for at, prompt in enumerate(prompts)
            for choice in range(request.n)
        ]

    async def _prompt(self, prompt: Prompt, model: Capabilities) -> tuple[Text, ...] | tuple[int, ...]:
        match prompt:
            case Conversation(messages=messages):
                return await self._chat_prompt(messages, model)
            case str():
                return (Text(text=prompt, special=True),)
            case _:
                if len(prompt) > model.context_length:
                    raise self._too_long(
                        f"the prompt has {len(prompt)} tokens, but the context holds {model.context_length}"
                    )
                _check_token(max(prompt), model, self.request.prompt_field)
                return prompt

    async def _chat_prompt(
        self, messages: tuple[Mapping[str, JsonValue], ...], model: Capabilities
    ) -> tuple[Text, ...]:
        param = self.request.prompt_field
        if model.chat_template is None:
            raise ApiError(
                400,
                "this model has no chat template; set chat_template in its model card, or use /v1/completions",
                code="no_chat_template",
                param="model",
            )
        try:
            return await chat_prompt(self._services.templates, model, messages)
        except ConversationRefusedError as error:
            raise ApiError(400, str(error), code="invalid_value", param=param) from None
        except NoncharacterError as error:
            raise ApiError(400, f"{param}: {error}", code="invalid_value", param=param) from None
        except TemplateError as error:
            raise ApiError(400, str(error), code="template_error", param=param) from None
        except PromptTooLongError as error:
            raise self._too_long(str(error)) from None

    def _too_long(self, message: str) -> ApiError:
        """What a runner says of a prompt that is too long, said here where sending it on would be a waste."""
        return self._failed(Failed(code="context_length_exceeded", message=message))


def _check_token(token: int, model: Capabilities, param: str) -> None:
    if token >= model.vocabulary:
        accepted = f"token ids of this model are 0 to {model.vocabulary - 1}"
        raise ApiError(400, f"{param}: {accepted} (got {token})", code="invalid_value", param=param)


async def _generate(process: RunnerProcess, sequences: list[Generate], sink: Sink) -> Failed | None:
    """Runs all sequences at once. The first failure ends the others and is returned."""
    failures: list[Failed] = []

    async def follow(choice: int, sequence: Generate) -> None:
        async with process.generate(sequence) as events:
            async for event in events:
                if isinstance(event, Finished) and event.reason == "cancelled":
                    event = Failed(id=event.id, code="shutdown", message="the runner cancelled the request")
                if isinstance(event, Failed):
                    failures.append(event)
                    tasks.cancel_scope.cancel()
                    return
                await sink.event(choice, event)

    async with anyio.create_task_group() as tasks:
        for choice, sequence in enumerate(sequences):
            tasks.start_soon(follow, choice, sequence)
    return failures[0] if failures else None


def total_usage(usages: Mapping[int, Usage], n: int) -> Usage:
    """Usage of a whole request from that of its choices: each prompt counts once, however many choices it has."""
    prompts = [usage for choice, usage in usages.items() if choice % n == 0]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages.values()),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
    )
