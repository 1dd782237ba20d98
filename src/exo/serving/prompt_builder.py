"""From what a request says to what a runner is told: prompt, grammar and how the output is to be read."""

from dataclasses import dataclass
from uuid import uuid4

from exo.chat.grammar.gbnf import GbnfError
from exo.chat.output.registry import OutputFormat
from exo.chat.sandbox_pool import SandboxBusyError
from exo.serving.app_state import Services
from exo.serving.errors import RequestError, busy
from exo.serving.failover import Attempts, LoadedRunner
from exo.serving.output_reader import Reader
from exo.serving.rendering import format_of, render
from exo.serving.request import Conversation, GenerationRequest, OutputConstraint, Prompt
from exo.serving.warnings import warn
from exo.worker.protocol.messages import Capabilities, Failed, Grammar, Text, Tokenize, Tokenized
from exo.worker.supervisor.runner_process import RunnerError

_LONGEST_TOKEN = 1024
"""Characters; the longest tokens of known vocabularies, which stand for spaces, have some hundred."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prompt for a runner. ``echo`` is its text, where the reply is to begin with it."""

    prompt: tuple[Text, ...] | tuple[int, ...]
    echo: str = ""
    grammar: Grammar | None = None
    conversation: Conversation | None = None
    form: OutputFormat | None = None
    in_reasoning: bool = False

    @property
    def special(self) -> bool:
        """Whether the output's text must show control tokens, because calls or reasoning are marked by them."""
        return self.form is not None and self.form.special

    def reader(self) -> Reader:
        """For one choice."""
        if self.form is None or self.conversation is None:
            return Reader(None)
        tools = self.conversation.tools if self.form.known or self.conversation.must_call else ()
        parser = self.form.parser(tools=tools, in_reasoning=self.in_reasoning)
        return Reader(parser, parallel=self.conversation.parallel)


async def prepare(
    services: Services, attempts: Attempts, runner: LoadedRunner, request: GenerationRequest, prompt: Prompt
) -> Prepared:
    """Raises ``ServingError`` and ``RunnerError``."""
    match prompt:
        case Conversation():
            return await _conversation(services, runner, request, prompt)
        case str():
            _check_length(len(prompt), runner.capabilities)
            grammar = await _grammar(services, request.constraint)
            return Prepared((Text(text=prompt, special=True),), prompt, grammar)
        case _:
            _check_tokens(prompt, runner.capabilities, request.prompt_field)
            grammar = await _grammar(services, request.constraint)
            echo = await _text(attempts, runner, prompt) if request.echo else ""
            return Prepared(prompt, echo, grammar)


async def _conversation(
    services: Services, runner: LoadedRunner, request: GenerationRequest, conversation: Conversation
) -> Prepared:
    model, card = runner.capabilities, runner.card
    form = format_of(runner)
    texts = await render(services, runner, conversation, request.prompt_field)
    _check_length(sum(len(text.text) for text in texts), model)
    if conversation.tools and not form.known:
        effect = "the call is forced as plain JSON" if conversation.must_call else "calls remain part of the text"
        reason = f"the chat template of {card.model_id} shows no call format that exo knows"
        warn("", f"tools: {reason}; {effect}, unless tool_format in the model card names one")
    inside = form.starts_in_reasoning("".join(text.text for text in texts))
    if conversation.must_call:
        grammar = _call_grammar(model, conversation, form, in_reasoning=inside)
    else:
        grammar = await _grammar(services, request.constraint)
        if grammar is not None:
            grammar = form.after_reasoning(grammar, special_tokens=_special(model), in_reasoning=inside)
    return Prepared(texts, grammar=grammar, conversation=conversation, form=form, in_reasoning=inside)


async def _grammar(services: Services, constraint: OutputConstraint | None) -> Grammar | None:
    """What the constraint says, in a notation that runners know; they check it. Raises ``ServingError``."""
    if constraint is None:
        return None
    if constraint.syntax != "gbnf":
        return Grammar(syntax=constraint.syntax, source=constraint.source)
    try:
        return Grammar(syntax="lark", source=await services.gbnf.lark(constraint.source))
    except SandboxBusyError as error:
        raise busy(constraint.param, error) from None
    except GbnfError as error:
        raise RequestError(f"{constraint.param}: {error}", code="invalid_value", param=constraint.param) from None


def _call_grammar(
    model: Capabilities, conversation: Conversation, form: OutputFormat, *, in_reasoning: bool
) -> Grammar:
    """A grammar of the calls that the request demands. Raises ``ServingError``."""
    param = conversation.choice_param
    try:
        source = form.call_grammar(
            conversation.forced,
            parallel=conversation.parallel,
            special_tokens=_special(model),
            in_reasoning=in_reasoning,
        )
    except ValueError as error:
        raise RequestError(f"{param}: {error}", code="unsupported_value", param=param) from None
    return Grammar(syntax="lark", source=source)


def _special(model: Capabilities) -> dict[str, int]:
    return dict(zip(model.special_tokens, model.special_ids, strict=True))


def _check_length(characters: int, model: Capabilities) -> None:
    """Spares the runner a text that it would tokenize for nothing."""
    if characters > model.context_length * _LONGEST_TOKEN:
        message = f"the prompt has {characters} characters, but the context holds {model.context_length} tokens"
        raise RunnerError(Failed(code="context_length_exceeded", message=message, param="prompt"))


def _check_tokens(prompt: tuple[int, ...], model: Capabilities, param: str) -> None:
    if len(prompt) > model.context_length:
        message = f"the prompt has {len(prompt)} tokens, but the context holds {model.context_length}"
        raise RunnerError(Failed(code="context_length_exceeded", message=message, param="prompt"))
    if max(prompt) >= model.vocabulary:
        accepted = f"token ids of this model are 0 to {model.vocabulary - 1}"
        raise RequestError(f"{param}: {accepted} (got {max(prompt)})", code="invalid_value", param=param)


async def _text(attempts: Attempts, runner: LoadedRunner, tokens: tuple[int, ...]) -> str:
    tokenized = await attempts.ask(runner, Tokenize(id=f"echo-{uuid4().hex}", prompt=tokens))
    assert isinstance(tokenized, Tokenized)
    return b"".join(map(bytes, tokenized.bytes)).decode(errors="replace")
