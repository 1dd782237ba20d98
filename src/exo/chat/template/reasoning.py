"""How a model is told whether and how much to reason."""

from pydantic import JsonValue

from exo.chat.output.format import OutputFormat

_NEAREST = {"minimal": "low", "xhigh": "high"}
"""For templates that do not name these levels. All that know levels know low, medium and high."""
_NEXT_MESSAGE = "<|start|>assistant"
"""Harmony has reasoning in a message of its own, behind which the next one begins."""
_ANSWER_BEGUN = ("<|channel|>final<|message|>",)
"""How a prompt ends in which the template itself has begun an answer without reasoning."""


def effort_variables(source: str, effort: str | None) -> list[dict[str, JsonValue]]:
    """Sets of variables by which chat templates are told an effort, the most telling first; the last is empty.

    ``effort`` is "none", "minimal", "low", "medium", "high", "xhigh" or, where the request does not say, None.
    """
    if effort is None:
        return [{}]
    named = _names(source, effort)
    switches = _switches(source, on=effort != "none")
    if effort == "none":
        levels: list[dict[str, JsonValue]] = [{"reasoning_effort": effort}] if named else []
        return [*({**level, **switch} for level in levels for switch in switches), *switches, *levels, {}]
    level: dict[str, JsonValue] = {"reasoning_effort": effort if named else _NEAREST.get(effort, effort)}
    return [*({**level, **switch} for switch in switches), level, *switches, {}]


def _switches(source: str, *, on: bool) -> list[dict[str, JsonValue]]:
    """What turns reasoning on or off: most templates have the first, DeepSeek V3.1 the second, MiniMax M3 the last."""
    mode = "enabled" if on else "disabled"
    modes: list[dict[str, JsonValue]] = [{"thinking_mode": mode}] if _names(source, mode) else []
    return [{"enable_thinking": on}, {"thinking": on}, *modes]


def _names(source: str, word: str) -> bool:
    return any(f"{quote}{word}{quote}" in source for quote in "\"'")


def empty_reasoning(form: OutputFormat, prompt: str) -> str:
    """What goes behind ``prompt``, as a chat template rendered it, so that the model's reply is without reasoning."""
    thinking = form.thinking
    if thinking is None or prompt.rstrip().endswith((thinking.end.strip(), *_ANSWER_BEGUN)):
        return ""
    begun = form.starts_in_reasoning(prompt)
    if form.name == "harmony":
        return ("" if begun else thinking.begin) + thinking.end + _NEXT_MESSAGE
    return ("\n" if begun else f"{thinking.begin}\n\n") + f"{thinking.end}\n\n"
