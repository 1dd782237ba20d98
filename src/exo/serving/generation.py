"""One request to generate text, in no API's form, from its place in the queue to its last token."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

from exo.cards.card import ModelCard
from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.chat.output.registry import OutputParser
from exo.serving.activity import current_record
from exo.serving.admission import Place
from exo.serving.errors import RequestError, ServingError, from_failed
from exo.serving.events import (
    ChoiceDelta,
    ChoiceFinished,
    ChoicePrompt,
    ChoiceStarted,
    Completed,
    GenerationEvent,
    Prefill,
    Started,
)
from exo.serving.failover import Failover, LoadedRunner
from exo.serving.prompt_builder import PreparedPrompt, prepare
from exo.serving.request import GenerationRequest, RequestedModel, naming_tools, with_enforced_schemas
from exo.serving.warnings import warn_of_context
from exo.worker.protocol.commands import Generate, SamplingParams
from exo.worker.protocol.events import (
    Capabilities,
    Delta,
    Failed,
    Finished,
    PrefillProgress,
    PromptLogprobs,
    Usage,
)
from exo.worker.protocol.messages import MAX_PROMPT_LOGPROBS
from exo.worker.supervisor.replay import Replay, ReplayBudget
from exo.worker.supervisor.runner_error import RunnerError
from exo.worker.supervisor.state_machine import RequestEvents

if TYPE_CHECKING:
    from exo.serving.app_state import Services

log = logging.getLogger(__name__)

_SEEDS = 1 << 64


@final
class ChoiceReader:
    """Reads the events of one choice. Without a parser all text is content.

    If ``parallel`` is false, calls after the first are dropped. A stream cannot take a broken call back, and clients
    run the calls of a reply that finishes for them, so a choice with a broken call never has that finish reason.
    """

    def __init__(self, choice: int, parser: OutputParser | None, *, parallel: bool = True) -> None:
        self._choice = choice
        self._parser = parser
        self._parallel = parallel
        self._calls = 0
        self._broken = False
        self._unread = 0  # tokens whose text the parser holds back
        self._reasoning_tokens = 0

    def read(
        self, event: PrefillProgress | PromptLogprobs | Delta | Finished
    ) -> Prefill | ChoicePrompt | ChoiceDelta | ChoiceFinished:
        """The next event of the choice."""
        match event:
            case Delta():
                self._unread += len(event.tokens)
                parts = self._parts(event.text)
                self._count(parts)
                return ChoiceDelta(self._choice, parts, event.tokens, event.logprobs)
            case Finished():
                return self._finish(event)
            case PrefillProgress():
                return Prefill(self._choice, event.processed, event.total)
            case PromptLogprobs():
                return ChoicePrompt(self._choice, event.start, event.items)

    def _finish(self, event: Finished) -> ChoiceFinished:
        assert event.reason != "cancelled"
        parts = self._parts(event.text)
        if self._parser is not None:
            cut_off = event.reason == "length" or event.stop is not None
            parts += self._kept(self._parser.finish(cut_off=cut_off))
        called = self._calls and not self._broken and event.reason == "stop"
        self._count(parts)
        reason = "tool_calls" if called else event.reason
        return ChoiceFinished(self._choice, parts, reason, event.stop, event.usage, self._reasoning_tokens)

    def _count(self, parts: tuple[Part, ...]) -> None:
        """Counts reasoning tokens. Tokens whose text was held back belong to the first part that comes of it."""
        if parts:
            self._reasoning_tokens += self._unread if isinstance(parts[0], Reasoning) else 0
            self._unread = 0

    def _parts(self, text: str) -> tuple[Part, ...]:
        if not text:
            return ()
        return (Content(text),) if self._parser is None else self._kept(self._parser.push(text))

    def _kept(self, parts: list[Part]) -> tuple[Part, ...]:
        for part in parts:
            if isinstance(part, ToolCall):
                self._calls += 1
            elif isinstance(part, BrokenCall) and (self._parallel or part.index == 0):
                self._broken = True
        if not self._parallel and self._calls > 1:
            parts = [
                part for part in parts if not isinstance(part, ToolCall | Arguments | BrokenCall) or part.index == 0
            ]
        return tuple(parts)


@dataclass(slots=True)
class _RunningChoice:
    """One choice. ``arrival`` is set when a runner has sent an event of it, or of another choice of the request."""

    number: int
    replay: Replay
    reader: ChoiceReader
    arrival: asyncio.Event
    started: bool = False
    runner: LoadedRunner = field(init=False)
    events: RequestEvents = field(init=False)

    async def run(self, runner: LoadedRunner, in_flight: AsyncExitStack) -> None:
        """Sends the request, or what remains of it, to a runner. Closing ``in_flight`` cancels it."""
        self.runner = runner
        sending = runner.process.generate(self.replay.remainder(), self.arrival)
        self.events = await in_flight.enter_async_context(sending)

    def take(self, event: PrefillProgress | PromptLogprobs | Delta | Finished, batch: list[GenerationEvent]) -> None:
        """Adds a runner's event to ``batch``."""
        if not self.started:
            self.started = True
            prompt_tokens = event.total if isinstance(event, PrefillProgress) else 0
            batch.append(ChoiceStarted(self.number, prompt_tokens))
        batch.append(self.reader.read(event))


@final
class Generation:
    """Serves one request. The events that have arrived come in one batch, so a slow reader gets fewer batches."""

    def __init__(
        self, services: "Services", model: RequestedModel, request: GenerationRequest, request_id: str
    ) -> None:
        """Raises ``ServingError``."""
        self.record = current_record()
        self.record.model = model.card.model_id
        self.request = with_enforced_schemas(request)
        self.id = request_id
        self.n_choices = self.request.choices
        self.place: Place  # in the queue of the model; it exists once ``running`` is entered
        self._services = services
        self._model = model.with_adapters(request.adapters)
        self._prompt_logprobs = 0

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[AsyncGenerator[list[GenerationEvent]]]:
        """A place in the queue, and the stream of events. Leaving the context cancels the request.

        The stream raises ``ServingError``, and so does the context: if the queue is full, and if the server stops.
        """
        request, model_id = self.request, self._model.card.model_id
        names = (self.id, self.record.id)
        # A stop of the server cancels the scope of the place. It is open here, around the reader of the stream, because
        # a scope that is open while a generator yields would cancel its reader at the wrong place.
        with (
            self._services.queues.place(model_id, self.n_choices, names) as self.place,
            Failover(self._services, self._model, request.needs, request.keep_seconds, request.prompts) as failover,
        ):
            self.record.begin(model_id, self.n_choices, self.place, request.n)
            async with aclosing(self._events(failover)) as batches:
                yield batches

    async def _events(self, failover: Failover) -> AsyncGenerator[list[GenerationEvent]]:
        usages: dict[int, Usage] = {}
        try:
            async with aclosing(failover.connect(ReplayBudget())) as steps:
                async for step in steps:
                    yield [step]
            started, choices = await self._prepare(failover)
            yield [started]
            async with AsyncExitStack() as in_flight:
                for choice in choices:
                    await choice.run(failover.runner, in_flight)
                active = choices
                while active:
                    await active[0].arrival.wait()
                    active[0].arrival.clear()
                    batch: list[GenerationEvent] = []
                    for choice in active:
                        if (failed := self._read(choice, batch, usages)) is None:
                            continue
                        yield batch
                        batch = []
                        try:
                            failover.check_replay(choice.runner, failed, choice.replay.budget)
                            self.record.replayed(choice.replay.n_delivered)
                        except RunnerError as error:
                            raise self._failed(error, choice.number // self.request.n) from None
                        # The other choices wait meanwhile. Most often the same death has ended them too.
                        async with aclosing(failover.connect(choice.replay.budget)) as steps:
                            async for step in steps:
                                yield [step]
                        await choice.run(failover.runner, in_flight)
                    if len(active) + len(usages) > len(choices):
                        active = [choice for choice in active if choice.number not in usages]
                    if not active:
                        batch.append(Completed(_total_usage(usages, self.request.n)))
                    yield batch
        except RunnerError as error:
            raise self._failed(error) from None

    async def _prepare(self, failover: Failover) -> tuple[Started, list[_RunningChoice]]:
        """Makes the prompts and what each choice needs. Raises ``ServingError`` and ``RunnerError``."""
        request, runner = self.request, failover.runner
        prepared = [await self._prepare_prompt(failover, at) for at in range(len(request.prompts))]
        self.record.note_prompts([each.prompt for each in prepared])
        sequences = self._sequences(runner.card, runner.capabilities, prepared)
        self._services.queues.slots_changed(runner.card.model_id)
        echoes = tuple([each.echo for each in prepared]) if request.echo else ()
        card = runner.card
        started = Started(self._model.name, runner.capabilities, echoes, sequences[0].sampling, card.quantization)
        arrival = asyncio.Event()
        return started, [
            _RunningChoice(number, Replay(sequence), self._reader(number, prepared[number // request.n]), arrival)
            for number, sequence in enumerate(sequences)
        ]

    async def _prepare_prompt(self, failover: Failover, at: int) -> PreparedPrompt:
        request = self.request
        if len(request.prompts) > 1:
            request = replace(request, prompt_field=f"{request.prompt_field}.{at}")
        try:
            return await prepare(self._services, failover, request, request.prompts[at])
        except RunnerError as error:
            raise self._failed(error, at) from None

    def _reader(self, number: int, prompt: PreparedPrompt) -> ChoiceReader:
        conversation = prompt.conversation
        return ChoiceReader(number, prompt.parser(), parallel=conversation is None or conversation.parallel)

    def _read(self, choice: _RunningChoice, batch: list[GenerationEvent], usages: dict[int, Usage]) -> Failed | None:
        """Moves the events that have arrived for a choice to ``batch``. Returns the last one if it is a failure."""
        for event in choice.events.take():
            match event:  # the most frequent case comes first
                case Delta():
                    choice.replay.take(event)
                    choice.take(event, batch)
                case Failed():
                    return event
                case Finished(reason="cancelled"):
                    return Failed(id=event.id, code="shutdown", message="the runner cancelled the request")
                case Finished():
                    usages[choice.number] = event.usage
                    choice.take(event, batch)
                case PromptLogprobs():
                    if (new := choice.replay.undelivered(event)).items:
                        self._count(new)
                        choice.take(new, batch)
                case PrefillProgress():
                    if event.diverged_at is not None:
                        self._log_divergence(event.diverged_at, event)
                    choice.take(event, batch)
        return None

    def _log_divergence(self, at: int, event: PrefillProgress) -> None:
        model, request = self._model.card.model_id, self.record.id or self.id
        log.info(
            "%s: the prompt of request %s differs from a cached one at token %s of %s; what follows is largely the same"
            " but is computed again, because the prefix cache reuses nothing after the first difference",
            model, request, f"{at + 1:,}", f"{event.total:,}",
        )  # fmt: skip

    def _count(self, prompt: PromptLogprobs) -> None:
        """Raises ``ServingError`` if the reply would become too large."""
        self._prompt_logprobs += sum([1 + len(item.top) for item in prompt.items])
        if self._prompt_logprobs > MAX_PROMPT_LOGPROBS:
            message = f"logprobs: the prompts of all choices have more than {MAX_PROMPT_LOGPROBS} log-probabilities"
            raise RequestError(message, code="invalid_value", param="logprobs")

    def _failed(self, error: RunnerError, prompt: int | None = None) -> ServingError:
        """A runner's failure with the client's names of the fields. ``prompt`` is the index of the one at fault."""
        request = self.request
        names = {
            **request.needs,
            "prompt": request.prompt_field,
            "prompt_logprobs": "logprobs",
            "stop_tokens": "stop_token_ids",
            "allowed": "allowed_token_ids",
            "adapters": "lora" if request.adapters else "model",
        }
        failed, member = naming_tools(error.failed, request), prompt if len(request.prompts) > 1 else None
        return from_failed(failed, params=names, retry_seconds=error.retry_seconds, member=member)

    def _sequences(self, card: ModelCard, model: Capabilities, prepared: list[PreparedPrompt]) -> list[Generate]:
        request = self.request
        if request.context:
            warn_of_context(request.context_param, request.context, model.context_length)
        for token in request.logit_bias:
            if token >= model.vocabulary:
                accepted = f"token ids of this model are 0 to {model.vocabulary - 1}"
                message = f"logit_bias: {accepted} (got {token})"
                raise RequestError(message, code="invalid_value", param="logit_bias")
        defaults = card.sampling_defaults.model_dump(exclude_none=True, exclude={"thinking", "non_thinking"})
        chosen = {**defaults, **request.sampling, "logit_bias": request.logit_bias, "allowed": request.allowed}
        first_seed = secrets.randbits(64) if request.seed is None else request.seed
        sequences: list[Generate] = []
        for at, each in enumerate(prepared):
            first = Generate(
                id=f"{self.id}-{at * request.n}",
                prompt=each.prompt,
                sampling=SamplingParams.model_validate({**chosen, "seed": first_seed % _SEEDS}),
                stop=request.stop,
                stop_tokens=request.stop_tokens,
                show_stop=request.show_stop,
                max_tokens=request.max_tokens,
                min_tokens=request.min_tokens,
                ignore_eos=request.ignore_eos,
                cache_prompt=request.cache_prompt,
                grammar=each.grammar,
                reasoning=each.reasoning,
                logprobs=request.logprobs,
                prompt_logprobs=request.logprobs if request.echo else None,
                show_special=each.special,
                adapters=self._model.adapters,
                exact=request.seed is not None,
            )
            sequences.append(first)
            for choice in range(1, request.n):  # copies, so that they have one prompt between them
                sampling = first.sampling.model_copy(update={"seed": (first_seed + choice) % _SEEDS})
                name = f"{self.id}-{at * request.n + choice}"
                sequences.append(first.model_copy(update={"id": name, "sampling": sampling}))
        return sequences


def _total_usage(usages: Mapping[int, Usage], n: int) -> Usage:
    """The usage of a request from that of its choices. Each prompt counts once, however many choices it has."""
    prompts = [usage for choice, usage in usages.items() if choice % n == 0]
    return Usage(
        prompt_tokens=sum([usage.prompt_tokens for usage in prompts]),
        completion_tokens=sum([usage.completion_tokens for usage in usages.values()]),
        cached_tokens=sum([usage.cached_tokens for usage in prompts]),
        drafted_tokens=sum([usage.drafted_tokens for usage in usages.values()]),
        accepted_tokens=sum([usage.accepted_tokens for usage in usages.values()]),
    )
