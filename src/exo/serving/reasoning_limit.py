"""How long a model may reason: the request's number of tokens, or what its reasoning effort allows."""

import re

from exo.chat.output.format import OutputFormat
from exo.chat.template.reasoning import closing
from exo.serving.request import Conversation
from exo.serving.warnings import warn
from exo.worker.protocol.commands import ReasoningLimit
from exo.worker.protocol.events import Capabilities

_MOST_OF_A_REPLY = 0.8
_LEVELS = {"minimal": (512, 0.1), "low": (2048, 0.2), "medium": (8192, 0.5), "high": (32_768, _MOST_OF_A_REPLY)}
"""Tokens of reasoning for an effort, and the most of them as a share of the whole reply's limit."""
_SWITCH = re.compile(r"\b(enable_thinking|reasoning_effort|thinking|thinking_mode)\b")


def reasoning_limit(
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
