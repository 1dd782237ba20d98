"""The variables and prompt endings that control whether and how much a model reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from exo.chat.output.format import OutputFormat
from exo.chat.template.renderer import GIVEN, TemplateWorker, VariableRefusedError, chat_prompt
from exo.worker.protocol.commands import Text
from exo.worker.protocol.events import Capabilities

# Substitutes for levels that a template does not name. All templates with levels name low, medium and high.
_NEAREST = {"minimal": "low", "on": "medium", "xhigh": "high"}
# In harmony, reasoning is a message of its own. The next one begins with this.
_NEXT_MESSAGE = "<|start|>assistant"
# The end of a prompt in which the template itself has begun an answer without reasoning.
_ANSWER_BEGUN = "<|channel|>final<|message|>"
SWITCHES = ("enable_thinking", "thinking")
"""Variables that turn reasoning on and off."""


def effort_variables(source: str, effort: str) -> list[dict[str, JsonValue]]:
    """Returns sets of template variables for an effort, the most specific first. The last one is empty.

    ``effort`` is as in ``Conversation``.
    """
    named = effort != "on" and _names(source, effort)
    switches = _switches(source, on=effort != "none")
    if effort == "none":
        levels: list[dict[str, JsonValue]] = [{"reasoning_effort": effort}] if named else []
        return [*({**level, **switch} for level in levels for switch in switches), *switches, *levels, {}]
    level: dict[str, JsonValue] = {"reasoning_effort": effort if named else _NEAREST.get(effort, effort)}
    return [*({**level, **switch} for switch in switches), level, *switches, {}]


def _switches(source: str, *, on: bool) -> list[dict[str, JsonValue]]:
    # Most templates have the first of these, DeepSeek V3.1 the second, MiniMax M3 the last.
    mode = "enabled" if on else "disabled"
    modes: list[dict[str, JsonValue]] = [{"thinking_mode": mode}] if _names(source, mode) else []
    return [{"enable_thinking": on}, {"thinking": on}, *modes]


def _names(source: str, word: str) -> bool:
    return any(f"{quote}{word}{quote}" in source for quote in "\"'")


def closing(form: OutputFormat) -> str:
    """Returns the text that ends reasoning in the middle. ``form.thinking`` is not None."""
    assert form.thinking is not None
    return form.thinking.end + _NEXT_MESSAGE if form.name == "harmony" else f"\n{form.thinking.end}\n\n"


def empty_reasoning(form: OutputFormat, prompt: str) -> str:
    """Returns the text to append to a rendered prompt so that the reply has no reasoning."""
    thinking = form.thinking
    if thinking is None or prompt.rstrip().endswith((thinking.end.strip(), _ANSWER_BEGUN)):
        return ""
    if form.starts_in_reasoning(prompt):
        return closing(form)
    return thinking.begin + ("" if form.name == "harmony" else "\n") + closing(form)


@dataclass(frozen=True, slots=True)
class ReasoningPrompt:
    """A prompt, and the variables that were given to the chat template for it."""

    texts: tuple[Text, ...]
    variables: Mapping[str, JsonValue]


async def reasoning_prompt(
    worker: TemplateWorker,
    model: Capabilities,
    messages: Sequence[Mapping[str, JsonValue]],
    form: OutputFormat,
    effort: str | None,
    *,
    tools: Sequence[Mapping[str, JsonValue]] = (),
    variables: Mapping[str, JsonValue] | None = None,
    continue_final_message: bool = False,
) -> ReasoningPrompt:
    """The prompt of ``chat_prompt`` for an effort, as in ``effort_variables``, or None if the model is to decide.

    ``variables`` that the template does not read are left out. The prompt ends with an empty reasoning block if nothing
    else keeps the model from reasoning. Raises what ``chat_prompt`` raises.
    """
    source = model.template(tools=bool(tools))
    assert source is not None
    given = dict(variables or {})
    off = effort == "none" or any(given.get(name) is False for name in SWITCHES)
    ways: list[dict[str, JsonValue]] = [{}] if effort is None else effort_variables(source, effort)
    texts: tuple[Text, ...] | None = None
    way: dict[str, JsonValue] = {}
    while texts is None:
        way = {**ways[0], **given}
        try:
            texts = await chat_prompt(
                worker, model, messages, tools=tools, variables=way, continue_final_message=continue_final_message
            )
        except VariableRefusedError as error:
            if error.name in GIVEN:
                raise
            if error.name in given:
                del given[error.name]
            else:
                del ways[0]
    if off and not continue_final_message:
        prompt = "".join(text.text for text in texts)
        switched = way.get("reasoning_effort") == "none" or any(name in way for name in SWITCHES)
        if (form.starts_in_reasoning(prompt) or not switched) and (closed := empty_reasoning(form, prompt)):
            texts = (*texts, Text(text=closed, special=True))
    return ReasoningPrompt(texts, way)
