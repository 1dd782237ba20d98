"""Renders a conversation to a prompt with a chat template, in the process of ``exo.chat.template.render_main``."""

import json
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from exo.chat.sandbox_pool import SandboxPool
from exo.chat.template.fitting import ATTEMPTS, Names, fitting, outline
from exo.chat.template.messages import template_messages
from exo.chat.template.render_main import CLOSE, LIMITS, OPEN
from exo.chat.template.reshaping import ChatMessage, reshaped
from exo.chat.template.special_tokens import special_tokens
from exo.worker.protocol.commands import Text
from exo.worker.protocol.events import Capabilities
from exo.worker.runner_common.sandbox import SandboxError

GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""The variables that callers may not set."""
_CUT = CLOSE + CLOSE
"""Marks the end of a message to be continued. ``SpecialTokens.mark`` never writes this."""
_MOST_FITS = 1024
# Stands for the request's tools while reshapings are tried.
_SOME_TOOL: dict[str, JsonValue] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
    },
}


class PromptError(Exception):
    """No prompt can be made of the conversation."""


class TemplateError(PromptError):
    """The chat template is faulty, too slow, or needs too much memory."""


class TemplateFailedError(TemplateError):
    """The chat template raised a Python exception, perhaps because of the messages."""


class ConversationRefusedError(PromptError):
    """The chat template refused the messages. The text of the error is the template's."""


class ToolsUnsupportedError(TemplateError):
    """The chat template has no place for the definitions of tools."""


class VariableRefusedError(ConversationRefusedError):
    """The chat template does not read the variable ``name``, or callers may not set it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"this model's chat template does not take {name!r}")
        self.name = name


class PromptTooLongError(PromptError):
    """The prompt cannot fit the context, however it is tokenized. It has ``tokens`` or more."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"the prompt has at least {tokens} tokens")
        self.tokens = tokens


class TemplateWorker:
    """A pool of rendering processes, started on demand and replaced when they die or take too long.

    A request takes about a tenth of a millisecond. Each method raises ``SandboxBusyError`` if all processes are busy
    for too long.
    """

    def __init__(self) -> None:
        self._processes = SandboxPool("exo.chat.template.render_main", LIMITS)
        self._fits: dict[tuple[str, str], Names] = {}

    async def prepare(self, source: str) -> None:
        """Starts a process and compiles ``source`` ahead of the first request. Raises ``TemplateError``."""
        await self._ask({"source": source})

    async def render(
        self, source: str, variables: Mapping[str, object], extra: Mapping[str, object] | None = None
    ) -> str:
        """Returns the rendered text. The template must read all ``extra`` variables, and the tools if there are any.

        Raises ``TemplateError`` and ``ConversationRefusedError``.
        """
        extra = extra or {}
        try:
            return await self._ask({"source": source, "variables": variables, "extra": extra})
        except VariableRefusedError as refused:
            if refused.name in extra:
                raise
            raise ToolsUnsupportedError("this model's chat template has no place for tools") from None

    async def fit(
        self,
        source: str,
        messages: Sequence[ChatMessage],
        variables: Mapping[str, object],
        extra: Mapping[str, object] | None = None,
    ) -> Names:
        """Returns the reshapings that the template needs for these messages. Other arguments as in ``render``.

        The result is cached by the conversation's outline. Raises what ``render`` raises, unless the messages cause it.
        """
        plan = outline(messages)
        given = {**variables, "tools": [_SOME_TOOL] if variables.get("tools") else None}
        key = source, json.dumps([plan.messages, given, extra], default=str)

        async def render(tried: Sequence[ChatMessage]) -> str | None:
            try:
                return await self.render(source, {**given, "messages": tried}, extra)
            except VariableRefusedError:
                raise
            except (ConversationRefusedError, TemplateFailedError):
                return None

        if key not in self._fits:
            found = await fitting(plan, render)
            if len(self._fits) == _MOST_FITS:
                self._fits.clear()
            self._fits[key] = found
        return self._fits[key]

    async def aclose(self) -> None:
        """Ends the processes."""
        await self._processes.aclose()

    async def _ask(self, request: Mapping[str, object]) -> str:
        try:
            answer = await self._processes.ask(request)
        except SandboxError as error:
            raise TemplateError(f"the chat template {error}") from None
        match answer:
            case {"raised": message}:
                raise ConversationRefusedError(message)
            case {"unread": name}:
                raise VariableRefusedError(name)
            case {"error": message}:
                raise TemplateFailedError(f"the chat template failed: {message}")
            case _:
                return answer["text"]


async def chat_prompt(
    worker: TemplateWorker,
    model: Capabilities,
    messages: Sequence[Mapping[str, JsonValue]],
    *,
    tools: Sequence[Mapping[str, JsonValue]] = (),
    variables: Mapping[str, JsonValue] | None = None,
    continue_final_message: bool = False,
) -> tuple[Text, ...]:
    """Returns the prompt that the model's chat template makes of ``messages``, each of which has at least a ``role``.

    ``messages`` and ``tools`` are in OpenAI's form. ``variables`` are further variables of the template, such as
    ``enable_thinking``. With ``continue_final_message``, the prompt ends where the last message's content does.

    Text that looks like a special token is taken literally. A template that writes the BOS text itself does not double
    it: the runner's tokenizer adds BOS only if the prompt does not begin with it.

    Raises ``TemplateError``, ``ToolsUnsupportedError``, ``ConversationRefusedError``, ``VariableRefusedError``,
    ``NoncharacterError`` and ``PromptTooLongError``.
    """
    source = model.template(tools=bool(tools))
    assert source is not None
    tokens = special_tokens(model.special_tokens)
    conversation = template_messages(source, messages)
    if continue_final_message:
        last = conversation[-1]
        if last["role"] != "assistant" or last.get("tool_calls") or not isinstance(last.get("content"), str):
            raise ConversationRefusedError("only an assistant message with text and without calls can be continued")
    given: dict[str, object] = {
        "tools": [tokens.mark(dict(tool)) for tool in tools] or None,
        "documents": None,
        "add_generation_prompt": not continue_final_message,
        "bos_token": model.bos_token,
        "eos_token": model.eos_token,
    }
    extra = {name: tokens.mark(value) for name, value in (variables or {}).items()}

    async def rendered(names: Names) -> str:
        marked = [
            {key: value if key == "role" else tokens.mark(value) for key, value in message.items()}
            for message in reshaped(conversation, names)
        ]
        if continue_final_message:
            _mark_end(marked[-1])
        return await worker.render(source, {**given, "messages": marked}, extra)

    try:
        text = await rendered(await worker.fit(source, conversation, given, extra))
    except VariableRefusedError:
        raise
    except (ConversationRefusedError, TemplateFailedError) as refused:
        try:
            text = await rendered(ATTEMPTS)
        except (ConversationRefusedError, TemplateFailedError):
            raise refused from None
    if continue_final_message:
        text, found, _ = text.rpartition(_CUT)
        if not found:
            raise TemplateError("the chat template leaves out the message to be continued")
    if (places := text.count(OPEN)) > model.context_length:  # each is at least one token, and costs time to split off
        raise PromptTooLongError(places)
    return tokens.split(text)


def _mark_end(last: dict[str, JsonValue]) -> None:
    match last["content"]:
        case [{"text": str(text)}]:
            last["content"] = [{"type": "text", "text": text + _CUT}]
        case content:
            last["content"] = f"{content}{_CUT}"
