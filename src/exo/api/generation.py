"""One request from route to last token, the same for every dialect: route, load, prompt, generate."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import anyio
from pydantic import JsonValue

from exo.api.attempts import Attempts, Runner
from exo.api.errors import ApiError, from_failed
from exo.api.queue import Place
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
from exo.worker.process import RunnerError
from exo.worker.replay import Budget, Replay
from exo.worker.router import Route, parse_model

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
        self.place: Place
        """In the model's queue; there is one from before ``routed`` is set."""
        self._services = services

    async def run(self, sink: Sink) -> None:
        """Returns when every choice is finished. Cancelling it cancels them. Raises ``ApiError``."""
        model = self._services.card(parse_model(self.request.model).name).model_id
        with self._services.queues.place(model, self.request.choices) as self.place:
            await self._serve(sink)

    async def _serve(self, sink: Sink) -> None:
        attempts = Attempts(self._services, self.request.model, self._route, sink.loading)
        try:
            runner = await attempts.runner(Budget())
            sequences = await self._sequences(runner.card, runner.capabilities)
            self._services.queues.slots_changed(runner.card.model_id)
            sink.serving(runner.card.model_id, runner.capabilities)
            await _generate(attempts, runner, sequences, sink)
        except RunnerError as error:
            raise self._failed(error.failed, error.retry_seconds) from None

    def _route(self, route: Route) -> None:
        self.headers = {"x-exo-runner": route.runner, "x-exo-route": route.reason}
        self.routed.set()

    def _failed(self, failed: Failed, retry_seconds: float | None = None) -> ApiError:
        return from_failed(failed, prompt_field=self.request.prompt_field, retry_seconds=retry_seconds)

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


async def _generate(attempts: Attempts, runner: Runner, sequences: list[Generate], sink: Sink) -> None:
    """Runs all sequences at once. The first failure ends the others. Raises ``RunnerError`` and ``ApiError``."""
    failures: list[RunnerError | ApiError] = []

    async def follow(choice: int, sequence: Generate) -> None:
        try:
            await attempts.generate(runner, Replay(sequence), partial(sink.event, choice))
        except (RunnerError, ApiError) as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for choice, sequence in enumerate(sequences):
            tasks.start_soon(follow, choice, sequence)
    if failures:
        raise failures[0]


def total_usage(usages: Mapping[int, Usage], n: int) -> Usage:
    """Usage of a whole request from that of its choices: each prompt counts once, however many choices it has."""
    prompts = [usage for choice, usage in usages.items() if choice % n == 0]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages.values()),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
    )
