"""One request from route to last token, the same for every dialect: route, load, prompt, generate."""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import anyio

from exo.cards.card import ModelCard
from exo.serving.admission import Place
from exo.serving.app_state import Services
from exo.serving.errors import RequestError, ServingError, from_failed
from exo.serving.failover import Attempts, GenerationEvent, LoadedRunner
from exo.serving.grammar_schemas import naming_tools, with_enforced_schemas
from exo.serving.output_reader import ChoiceEvent, Reader
from exo.serving.prompt_builder import Prepared, prepare
from exo.serving.request import GenerationRequest
from exo.serving.warnings import warn_of_context
from exo.worker.protocol.messages import (
    MAX_PROMPT_LOGPROBS,
    Capabilities,
    Failed,
    Generate,
    PromptLogprobs,
    SamplingParams,
)
from exo.worker.router import Route, parse_model
from exo.worker.supervisor.replay import Replay, ReplayBudget
from exo.worker.supervisor.runner_process import RunnerError

_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class Serving:
    """By what a request is served. ``prompts`` are the texts of its prompts, if the reply is to begin with them."""

    model_id: str
    capabilities: Capabilities
    prompts: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=partial(SamplingParams, seed=0))
    """What holds where the request and the card have had their say."""

    @property
    def fingerprint(self) -> str:
        """Names what a seed's result depends on."""
        return f"{self.capabilities.engine}-{self.capabilities.engine_version}"


class Sink(Protocol):
    """Where the events of a request go."""

    async def loading(self, note: str) -> None:
        """The model is not loaded yet, or not even on disk; ``note`` says how far that is."""
        ...

    def serving(self, serving: Serving) -> None:
        """The model is loaded; comes before the first event."""
        ...

    def event(self, choice: int, event: ChoiceEvent) -> None:
        """The next event of a choice; the last is ``Ended``."""
        ...

    async def flush(self) -> None:
        """Sends what there is. While it waits, it holds up one sequence and not the others."""
        ...


class Generation:
    """One request on its way. ``headers`` tell the route, and ``routed`` is set, once the router has decided."""

    def __init__(
        self, services: Services, request: GenerationRequest, request_id: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """``headers`` are further ones of the reply. Raises ``ServingError``."""
        self.request = with_enforced_schemas(request)
        self.id = request_id
        self.headers: Mapping[str, str] = headers or {}
        self.routed = asyncio.Event()
        self.place: Place
        """In the model's queue; there is one from before ``routed`` is set."""
        self._services = services

    async def run(self, sink: Sink) -> None:
        """Returns when every choice has ended. Cancelling it cancels them. Raises ``ServingError``."""
        wants = self.request = replace(self.request, model=self._services.named(self.request.model))
        model = self._services.card(parse_model(wants.model).name).model_id
        attempts = Attempts(self._services, wants.model, wants.needs, self._route, sink.loading, wants.keep_seconds)
        with self._services.queues.place(model, wants.choices) as self.place, attempts:
            await self._serve(attempts, sink)

    async def _serve(self, attempts: Attempts, sink: Sink) -> None:
        request = self.request
        try:
            runner = await attempts.runner(ReplayBudget())
            prepared = [await prepare(self._services, attempts, runner, request, each) for each in request.prompts]
            sequences = self._sequences(runner.card, runner.capabilities, prepared)
            self._services.queues.slots_changed(runner.card.model_id)
            echoes = tuple(each.echo for each in prepared if request.echo)
            sink.serving(Serving(runner.card.model_id, runner.capabilities, echoes, sequences[0].sampling))
            readers = [each.reader() for each in prepared for _ in range(request.n)]
            await _generate(attempts, runner, sequences, readers, sink)
        except RunnerError as error:
            raise self._failed(error.failed, error.retry_seconds) from None

    def _route(self, route: Route) -> None:
        self.headers = {**self.headers, "x-exo-runner": route.runner, "x-exo-route": route.reason}
        self.routed.set()

    def _failed(self, failed: Failed, retry_seconds: float | None) -> ServingError:
        """In the client's words."""
        names = {**self.request.needs, "prompt": self.request.prompt_field, "prompt_logprobs": "logprobs"}
        return from_failed(naming_tools(failed, self.request), params=names, retry_seconds=retry_seconds)

    def _sequences(self, card: ModelCard, model: Capabilities, prepared: list[Prepared]) -> list[Generate]:
        request = self.request
        warn_of_context(request.context_param, request.context, model.context_length)
        for token in request.logit_bias:
            if token >= model.vocabulary:
                accepted = f"token ids of this model are 0 to {model.vocabulary - 1}"
                message = f"logit_bias: {accepted} (got {token})"
                raise RequestError(message, code="invalid_value", param="logit_bias")
        defaults = card.sampling_defaults.model_dump(exclude_none=True, exclude={"thinking", "non_thinking"})
        chosen = {**defaults, **request.sampling, "logit_bias": request.logit_bias}
        first_seed = secrets.randbits(64) if request.seed is None else request.seed
        sequences: list[Generate] = []
        for at, each in enumerate(prepared):
            first = Generate(
                id=f"{self.id}-{at * request.n}",
                prompt=each.prompt,
                sampling=SamplingParams.model_validate({**chosen, "seed": first_seed % _SEEDS}),
                stop=request.stop,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
                grammar=each.grammar,
                logprobs=request.logprobs,
                prompt_logprobs=request.logprobs if request.echo else None,
                show_special=each.special,
                exact=request.seed is not None,
            )
            sequences.append(first)
            for choice in range(1, request.n):  # copies, so that they have one prompt between them
                sampling = first.sampling.model_copy(update={"seed": (first_seed + choice) % _SEEDS})
                name = f"{self.id}-{at * request.n + choice}"
                sequences.append(first.model_copy(update={"id": name, "sampling": sampling}))
        return sequences


async def _generate(
    attempts: Attempts, runner: LoadedRunner, sequences: list[Generate], readers: list[Reader], sink: Sink
) -> None:
    """Runs all sequences at once. The first failure ends the others. Raises ``RunnerError`` and ``ServingError``."""
    failures: list[RunnerError | ServingError] = []
    told = 0

    def pass_on(choice: int, event: GenerationEvent) -> None:
        nonlocal told
        if isinstance(event, PromptLogprobs):
            told += sum(1 + len(item.top) for item in event.items)
            if told > MAX_PROMPT_LOGPROBS:
                message = f"logprobs: the prompts of all choices have more than {MAX_PROMPT_LOGPROBS} log-probabilities"
                raise RequestError(message, code="invalid_value", param="logprobs")
        sink.event(choice, readers[choice].read(event))

    async def follow(choice: int) -> None:
        await attempts.generate(runner, Replay(sequences[choice]), partial(pass_on, choice), sink.flush)

    async def follow_beside_others(choice: int) -> None:
        try:
            await follow(choice)
        except (RunnerError, ServingError) as error:
            failures.append(error)
            tasks.cancel_scope.cancel()

    if len(sequences) == 1:
        await follow(0)
        return
    async with anyio.create_task_group() as tasks:
        for choice in range(len(sequences)):
            tasks.start_soon(follow_beside_others, choice)
    if failures:
        raise failures[0]
