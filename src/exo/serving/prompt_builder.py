"""Makes the prompt and the grammar of a request, and the reader of its output."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import uuid4

from pydantic import JsonValue

from exo.chat.grammar.gbnf import GbnfError
from exo.chat.output.registry import OutputFormat, OutputParser, output_format
from exo.chat.sandbox_pool import SandboxBusyError
from exo.chat.template.reasoning import SWITCHES, closing, reasoning_prompt
from exo.chat.template.renderer import (
    ConversationRefusedError,
    PromptTooLongError,
    TemplateError,
    ToolsUnsupportedError,
    VariableRefusedError,
)
from exo.chat.template.special_tokens import NoncharacterError
from exo.serving.errors import RequestError, busy, from_failed
from exo.serving.failover import Failover, LoadedRunner
from exo.serving.pictures.prompt_pictures import placed, unseen
from exo.serving.request import Conversation, GenerationRequest, Infill, OutputConstraint, Prompt
from exo.serving.warnings import warn
from exo.worker.protocol.commands import Grammar, Picture, ReasoningLimit, Text, Tokenize
from exo.worker.protocol.events import Capabilities, Failed, Tokenized
from exo.worker.supervisor.runner_error import RunnerError

if TYPE_CHECKING:
    from exo.serving.app_state import Services

_LONGEST_TOKEN = 1024
"""Characters. The longest tokens of known vocabularies are runs of some hundred spaces."""
_CHARACTERS_PER_TOKEN = 4
"""An estimate for English text. It measures a text that is too long to be tokenized."""
_MOST_OF_A_REPLY = 0.8
_LEVELS = {"minimal": (512, 0.1), "low": (2048, 0.2), "medium": (8192, 0.5), "high": (32_768, _MOST_OF_A_REPLY)}
"""Tokens of reasoning for an effort, and the most of them as a share of the whole reply's limit."""
_SWITCH = re.compile(r"\b(enable_thinking|reasoning_effort|thinking|thinking_mode)\b")


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """One prompt for a runner. ``echo`` is its text if the reply begins with it."""

    prompt: tuple[Text | Picture, ...] | tuple[int, ...]
    echo: str = ""
    grammar: Grammar | None = None
    reasoning: ReasoningLimit | None = None
    conversation: Conversation | None = None
    form: OutputFormat | None = None
    in_reasoning: bool = False

    @property
    def special(self) -> bool:
        """Whether the output must contain control tokens as text, because they mark calls or reasoning."""
        return self.form is not None and self.form.special

    def parser(self) -> OutputParser | None:
        """A parser for the output of one choice; None if all text is content."""
        if self.form is None or self.conversation is None:
            return None
        tools = self.conversation.tools if self.form.known or self.conversation.forced else ()
        return self.form.parser(tools=tools, in_reasoning=self.in_reasoning)


async def prepare(
    services: "Services", failover: Failover, request: GenerationRequest, prompt: Prompt
) -> PreparedPrompt:
    """Prepares a prompt for ``failover.runner``. Raises ``ServingError`` and ``RunnerError``."""
    runner = failover.runner
    match prompt:
        case Conversation():
            return await _conversation(services, runner, request, prompt)
        case str():
            _check_length(len(prompt), runner.capabilities)
            grammar = await _grammar(services, request.constraint)
            return PreparedPrompt((Text(text=prompt, special=True),), prompt, grammar)
        case Infill():
            texts = _infill(prompt, runner)
            _check_length(sum(len(text.text) for text in texts), runner.capabilities)
            return PreparedPrompt(texts, grammar=await _grammar(services, request.constraint))
        case _:
            tokens = await _tokens(failover, prompt)
            _check_tokens(tokens, runner.capabilities, request.prompt_field)
            grammar = await _grammar(services, request.constraint)
            echo = await _text(failover, tokens) if request.echo else ""
            return PreparedPrompt(tokens, echo, grammar)


async def _conversation(
    services: "Services", runner: LoadedRunner, request: GenerationRequest, conversation: Conversation
) -> PreparedPrompt:
    model, card = runner.capabilities, runner.card
    form = format_of(runner, conversation)
    pictures: dict[str, Picture] = {}
    if model.vision:
        pictures = await services.pictures.read(conversation.pictures)
    else:
        conversation = without_pictures(runner, conversation)
    texts = await render(services, runner, conversation, request.prompt_field)
    _check_length(sum(len(text.text) for text in texts), model)
    if conversation.tools and not form.known:
        effect = "the call is forced as plain JSON" if conversation.forced else "calls remain part of the text"
        reason = f"the chat template of {card.model_id} shows no call format that exo knows"
        warn("", f"tools: {reason}; {effect}, unless tool_format in the model card names one")
    inside = form.starts_in_reasoning("".join(text.text for text in texts))
    if conversation.forced:
        grammar = _call_grammar(model, conversation, form, in_reasoning=inside)
    else:
        grammar = await _grammar(services, request.constraint)
        if grammar is not None:
            grammar = form.after_reasoning(grammar, special_tokens=_special_ids(model), in_reasoning=inside)
    limit = _reasoning_limit(conversation, form, model, request.max_tokens, inside=inside)
    prompt: tuple[Text | Picture, ...] = texts
    if pictures:
        prompt = tuple(placed(texts, pictures))
        if sum(isinstance(part, Picture) for part in prompt) < len(pictures):
            first = next(iter(conversation.pictures.values())).param
            message = f"{first}: the chat template of {card.model_id} leaves a picture out"
            raise RequestError(message, code="template_error", param=first)
    return PreparedPrompt(
        prompt, grammar=grammar, reasoning=limit, conversation=conversation, form=form, in_reasoning=inside
    )


def _reasoning_limit(
    conversation: Conversation, form: OutputFormat, model: Capabilities, max_tokens: int | None, *, inside: bool
) -> ReasoningLimit | None:
    """The limit of the reasoning in a reply; None if there is none. Warns if one cannot be enforced.

    ``max_tokens`` limits the whole reply. With ``inside``, the reply begins in reasoning.
    """
    most, param = conversation.reasoning_tokens, conversation.reasoning_tokens_param
    given = most is not None
    if most is None and conversation.effort in _LEVELS:
        param, (most, share) = conversation.effort_param, _LEVELS[conversation.effort]
        if max_tokens is not None:
            most = min(most, int(max_tokens * share))
    if most is None:
        return None
    if form.thinking is None:
        switched = _SWITCH.search(model.template(tools=bool(conversation.tools)) or "")
        if switched:
            warn(param, "does not limit the reasoning: this model's marker at the end of reasoning is unknown")
        elif given and conversation.effort is None:
            warn(param, "this model does not reason, so it has no effect")
    elif not model.grammar:
        warn(param, "does not limit the reasoning: this model runs in several processes, where no token is prescribed")
    else:
        thinking = form.thinking
        if max_tokens and most >= max_tokens:
            most = int(max_tokens * _MOST_OF_A_REPLY)
            warn(param, f"is not less than the reply's limit; {most} tokens of reasoning leave room for an answer")
        return ReasoningLimit(
            max_tokens=most,
            begin=thinking.begin,
            end=thinking.end,
            closing=closing(form),
            inside=inside,
            anywhere=thinking.anywhere,
        )
    return None


def without_pictures(runner: LoadedRunner, conversation: Conversation) -> Conversation:
    """The conversation for a model that sees no pictures. Raises ``RequestError`` if the reply is about one."""
    if not conversation.pictures:
        return conversation
    why = f"{runner.card.model_id} sees no pictures here"
    messages = unseen(conversation.messages, conversation.pictures, why)
    return replace(conversation, messages=messages, pictures={})


async def _grammar(services: "Services", constraint: OutputConstraint | None) -> Grammar | None:
    """The constraint in a notation that runners know. The runner checks it. Raises ``ServingError``."""
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
    """A grammar of the calls that the request requires. Raises ``ServingError``."""
    param = conversation.choice_param
    try:
        source = form.call_grammar(
            conversation.forced,
            parallel=conversation.parallel,
            special_tokens=_special_ids(model),
            in_reasoning=in_reasoning,
        )
    except ValueError as error:
        raise RequestError(f"{param}: {error}", code="unsupported_value", param=param) from None
    return Grammar(syntax="lark", source=source)


def _special_ids(model: Capabilities) -> dict[str, int]:
    return dict(zip(model.special_tokens, model.special_ids, strict=True))


def _check_length(characters: int, model: Capabilities) -> None:
    """Refuses a text that cannot fit, before the runner tokenizes it."""
    if characters > model.context_length * _LONGEST_TOKEN:
        raise RunnerError(_too_long(f"{characters} characters", characters // _CHARACTERS_PER_TOKEN, model))


def _too_long(size: str, tokens: int, model: Capabilities) -> Failed:
    """``tokens`` may be an estimate."""
    return Failed(
        code="context_length_exceeded",
        message=f"the prompt has {size}, but the context holds {model.context_length} tokens",
        param="prompt",
        prompt_tokens=tokens,
        context_length=model.context_length,
    )


def _check_tokens(prompt: tuple[int, ...], model: Capabilities, param: str) -> None:
    if len(prompt) > model.context_length:
        raise RunnerError(_too_long(f"{len(prompt)} tokens", len(prompt), model))
    if max(prompt) >= model.vocabulary:
        accepted = f"token ids of this model are 0 to {model.vocabulary - 1}"
        raise RequestError(f"{param}: {accepted} (got {max(prompt)})", code="invalid_value", param=param)


def _infill(prompt: Infill, runner: LoadedRunner) -> tuple[Text, ...]:
    """The prompt in the order prefix, suffix, middle. Raises ``ServingError`` if the model lacks a token for it."""
    fim = runner.capabilities.fim
    needed = {"fim_pre": fim.prefix, "fim_suf": fim.suffix, "fim_mid": fim.middle}
    if lacking := [name for name, text in needed.items() if not text]:
        message = (
            f"{prompt.suffix_param}: {runner.card.model_id} cannot fill in the middle of a text: its vocabulary has no"
            f" control token for {', '.join(lacking)}; code models such as Qwen2.5-Coder have them"
        )
        raise RequestError(message, code="unsupported_parameter", param=prompt.suffix_param)
    parts: list[tuple[str, bool]] = []
    if prompt.files and fim.repository:
        parts += [(fim.repository, True), ("repository\n", False)]
    for name, text in prompt.files:
        parts += [(fim.file, True), (f"{name}\n{text}", False)] if fim.file else [(f"\n# {name}\n{text}", False)]
    if prompt.files and fim.file:
        parts += [(fim.file, True), ("this file\n", False)]
    parts += [(fim.prefix, True), (prompt.prefix, False), (fim.suffix, True), (prompt.suffix, False)]
    parts += [(fim.middle, True), (prompt.beginning, False)]
    return tuple(Text(text=text, special=special) for text, special in parts if text)


async def _tokens(failover: Failover, prompt: tuple[int | str, ...]) -> tuple[int, ...]:
    """Token ids, with those of the texts among them."""
    tokens: list[int] = []
    for at, part in enumerate(prompt):
        if isinstance(part, int):
            tokens.append(part)
        elif part:
            text = (Text(text=part, special=True),)
            found = await failover.ask(Tokenize(id=f"part-{uuid4().hex}", prompt=text, add_bos=at == 0))
            assert isinstance(found, Tokenized)
            tokens += found.tokens
    return tuple(tokens)


async def _text(failover: Failover, tokens: tuple[int, ...]) -> str:
    tokenized = await failover.ask(Tokenize(id=f"echo-{uuid4().hex}", prompt=tokens))
    assert isinstance(tokenized, Tokenized)
    return b"".join(map(bytes, tokenized.bytes)).decode(errors="replace")


def format_of(runner: LoadedRunner, conversation: Conversation) -> OutputFormat:
    """The form in which the runner's model writes reasoning and calls."""
    card, template = runner.card, runner.capabilities.template(tools=bool(conversation.tools))
    return output_format(template, card.tool_format, card.reasoning_dialect)


async def render(
    services: "Services", runner: LoadedRunner, conversation: Conversation, prompt_field: str
) -> tuple[Text, ...]:
    """The conversation's prompt. Raises ``ServingError``."""
    model = runner.capabilities
    if model.chat_template is None:
        encodes = (model.embeddings or model.rerank) and not model.logprobs
        reason = "is an encoder, which generates no text; it is for /v1/embeddings or /v1/rerank"
        lacks = "has no chat template; set chat_template in its model card, or use /v1/completions"
        message = f"this model {reason if encodes else lacks}"
        raise RequestError(message, code="no_chat_template", param="model")
    try:
        return await _render(services, runner, conversation)
    except SandboxBusyError as error:
        raise busy(prompt_field, error) from None
    except VariableRefusedError as error:
        param = f"chat_template_kwargs.{error.name}"
        raise RequestError(f"{param}: {error}", code="unsupported_parameter", param=param) from None
    except ToolsUnsupportedError as error:
        raise RequestError(f"tools: {error}", code="unsupported_parameter", param="tools") from None
    except ConversationRefusedError as error:
        raise RequestError(str(error), code="invalid_value", param=prompt_field) from None
    except NoncharacterError as error:
        raise RequestError(f"{prompt_field}: {error}", code="invalid_value", param=prompt_field) from None
    except TemplateError as error:
        raise RequestError(str(error), code="template_error", param=prompt_field) from None
    except PromptTooLongError as error:
        failed = _too_long(f"{error.tokens} tokens or more", error.tokens, model)
        raise from_failed(failed, params={"prompt": prompt_field}) from None


async def _render(services: "Services", runner: LoadedRunner, conversation: Conversation) -> tuple[Text, ...]:
    """Renders the prompt, and warns of what the template does not read. Raises the exceptions of ``chat_prompt``."""
    given, form = conversation.variables, format_of(runner, conversation)
    made = await reasoning_prompt(
        services.templates,
        runner.capabilities,
        conversation.messages,
        form,
        conversation.effort,
        tools=[tool.definition() for tool in conversation.tools],
        variables=given,
        continue_final_message=conversation.continues,
    )
    for name, value in given.items():
        if name not in made.variables and (name not in SWITCHES or value is not False):
            warn(f"chat_template_kwargs.{name}", "this model's chat template does not read it")
    off = any(given.get(name) is False for name in SWITCHES) and not conversation.continues
    if conversation.effort not in (None, "none") and not off:
        _tell_effect(conversation, form, made.variables)
    return made.texts


def _tell_effect(conversation: Conversation, form: OutputFormat, way: Mapping[str, JsonValue]) -> None:
    """Warns if the requested effort changes nothing."""
    if form.thinking is None and not way:
        warn(conversation.effort_param, "this model does not reason, so it has no effect")
    elif "reasoning_effort" not in way and conversation.effort not in ("medium", "on"):
        limits = "" if conversation.effort == "xhigh" else " and limits its length"
        warn(
            conversation.effort_param,
            f"this model's chat template knows no levels of reasoning, so it only turns it on{limits}",
        )
