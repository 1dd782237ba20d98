"""The variables and prompt endings that control whether and how much a model reasons."""

from pydantic import JsonValue

from exo.chat.output.format import OutputFormat

# Substitutes for levels that a template does not name. All templates with levels name low, medium and high.
_NEAREST = {"minimal": "low", "on": "medium", "xhigh": "high"}
# In harmony, reasoning is a message of its own. The next one begins with this.
_NEXT_MESSAGE = "<|start|>assistant"
# The end of a prompt in which the template itself has begun an answer without reasoning.
_ANSWER_BEGUN = "<|channel|>final<|message|>"


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
