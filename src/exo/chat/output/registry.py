"""Reading a model's reply: what of its text is content, reasoning, or calls of tools, and in which format.

How to use it, request by request::

    form = output_format(model.chat_template, card.tool_format, card.reasoning_dialect)
    prompt = await chat_prompt(worker, model, messages, tools=[tool.definition() for tool in tools])
    inside = form.starts_in_reasoning("".join(text.text for text in prompt))
    grammar = form.call_grammar(tools, parallel=True, special_tokens=ids, in_reasoning=inside)  # where a call is due
    parser = form.parser(tools=tools, in_reasoning=inside)
    parts = parser.push("text as it arrives")
    parts += parser.finish()
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from exo.chat.output.format import OutputFormat, OutputParser
from exo.chat.output.formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from exo.chat.output.formats.gemma import FUNCTION_GEMMA, GEMMA, GEMMA4
from exo.chat.output.formats.harmony import HARMONY
from exo.chat.output.formats.hermes import ERNIE, HERMES
from exo.chat.output.formats.json_lists import (
    APERTUS,
    APRIEL,
    COHERE,
    COMMAND_R,
    FUNCTION,
    GIGACHAT3,
    GIGACHAT31,
    GRANITE3,
    HUNYUAN,
    LONGCAT,
    MINIMAX_M1,
    NEMOTRON,
    TOOL_CALLS,
    UNKNOWN,
    XLAM,
)
from exo.chat.output.formats.kimi import KIMI
from exo.chat.output.formats.kimi_k3 import KIMI_K3
from exo.chat.output.formats.llama3 import LLAMA3, LLAMA4
from exo.chat.output.formats.minimax_m3 import MINIMAX_M3
from exo.chat.output.formats.mistral import MISTRAL, MISTRAL_ARRAY
from exo.chat.output.formats.pythonic import LFM2, OLMO3, PYTHONIC
from exo.chat.output.formats.tags import (
    DEEPSEEK_V4,
    DEEPSEEK_V32,
    GLM,
    HUNYUAN3,
    MINICPM5,
    MINIMAX,
    QWEN3_CODER,
    SEED,
)
from exo.chat.output.parser import Thinking

__all__ = ["FORMATS", "OutputFormat", "OutputParser", "output_format"]

NONE = OutputFormat("none")
"""Without calls; reasoning is told from content all the same."""

FORMATS: Mapping[str, OutputFormat] = {
    form.name: form
    for form in (
        NONE,
        HERMES,
        QWEN3_CODER,
        LLAMA3,
        MISTRAL,
        MISTRAL_ARRAY,
        GEMMA,
        FUNCTION_GEMMA,
        GEMMA4,
        DEEPSEEK_V3,
        DEEPSEEK_V31,
        GLM,
        KIMI,
        MINIMAX,
        HARMONY,
        APERTUS,
        APRIEL,
        COHERE,
        COMMAND_R,
        DEEPSEEK_V32,
        DEEPSEEK_V4,
        ERNIE,
        FUNCTION,
        GIGACHAT3,
        GIGACHAT31,
        GRANITE3,
        HUNYUAN,
        HUNYUAN3,
        KIMI_K3,
        LFM2,
        LLAMA4,
        LONGCAT,
        MINICPM5,
        MINIMAX_M1,
        MINIMAX_M3,
        NEMOTRON,
        OLMO3,
        PYTHONIC,
        SEED,
        TOOL_CALLS,
        XLAM,
    )
}
"""Every format by name."""

_SIGNS: tuple[tuple[OutputFormat, tuple[str, ...]], ...] = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    (GEMMA4, ("<|tool_call>",)),
    (FUNCTION_GEMMA, ("<start_function_call>",)),
    (KIMI, ("<|tool_calls_section_begin|>",)),
    (KIMI_K3, ("<|open|>", "<|sep|>")),
    (DEEPSEEK_V32, ("\uff5cDSML\uff5c", "function_calls>")),
    (DEEPSEEK_V4, ("\uff5cDSML\uff5c",)),
    (SEED, ("<seed:tool_call>",)),
    (HUNYUAN3, ("<tool_sep", ":opensource")),
    (MINICPM5, ('<function name="', '<param name="')),
    (APERTUS, ("<|tools_prefix|>",)),
    (COHERE, ("<|START_ACTION|>",)),
    (COMMAND_R, ("<|CHATBOT_TOKEN|>", "Action:", '"tool_name"')),
    (GIGACHAT31, ("<|function_call|>", "<|role_sep|>")),
    (GIGACHAT3, ("function call", "<|role_sep|>")),
    (NEMOTRON, ("<TOOLCALL>",)),
    (MINIMAX_M3, ("]<]minimax[>[",)),
    (MINIMAX_M1, ("<tool_calls>", "<end_of_sentence>")),
    (APRIEL, ("<tool_calls>", "[BEGIN FINAL RESPONSE]")),
    (HUNYUAN, ("<tool_calls>", "<answer>", "</answer>")),
    (TOOL_CALLS, ("<tool_calls>[",)),
    (LONGCAT, ("<longcat_tool_call>",)),
    (LFM2, ("<|tool_call_start|>",)),
    (LFM2, ("<|tool_list_start|>",)),
    (LFM2, ("List of tools: [", "<|im_start|>")),
    (OLMO3, ("<function_calls>",)),
    (PYTHONIC, ("[func_name1(",)),
    (LLAMA4, ("<|header_start|>", "tools", '"parameters"')),
    (XLAM, ("calls in a single JSON array",)),
    (DEEPSEEK_V3, (*DEEPSEEK_V3.begin[:1], "```json")),
    (DEEPSEEK_V31, DEEPSEEK_V31.begin[:1]),
    (MISTRAL, ("[TOOL_CALLS]", "[ARGS]")),
    (MISTRAL_ARRAY, ("[TOOL_CALLS]",)),
    (MINIMAX, ("<minimax:tool_call>",)),
    (GLM, ("<tool_call>", "<arg_key>")),
    (QWEN3_CODER, ("<tool_call>", "<function=", "<parameter=")),
    (ERNIE, ("<tool_call>", "<response>", "</think>")),
    (HERMES, ("<tool_call>",)),
    (FUNCTION, ("<function=", "</function>")),
    (LLAMA3, ("<|python_tag|>",)),
    (GRANITE3, ("<|tool_call|>",)),
    (GEMMA, ("tool_code",)),
    (GEMMA, ("<start_of_turn>", "tools", '"parameters"')),
    (LLAMA3, ("<|start_header_id|>", "tools", '"parameters"')),
)
"""What a chat template must have in it to be of a format; the first that fits is meant."""
_TOOLS = re.compile(r"\btools\b")

_THINK = Thinking("<think>", "</think>")
_BRACKETS = Thinking("[THINK]", "[/THINK]")
_TAG_DIALECTS = ("post_last_user", "suffix", "tool_conditional")
_CHANNEL_DIALECT = "channel"
"""Upstream's words for how a chat template takes earlier reasoning back. They also tell how the model marks it."""


def output_format(template: str | None, tool_format: str = "auto", reasoning_dialect: str = "none") -> OutputFormat:
    """The format that a card names, or else the one that its chat template gives away.

    A template that reads ``tools`` and shows no format's marker has a format that is not ``known``. Raises ``KeyError``
    for a ``tool_format`` that is neither "auto" nor in ``FORMATS``.
    """
    source = template or ""
    form = _recognised(source, reasoning_dialect) if tool_format == "auto" else FORMATS[tool_format]
    thinking = form.thinking or _thinking(source, reasoning_dialect)
    return replace(form, thinking=thinking, special=form.special or thinking == _BRACKETS)


def _recognised(template: str, dialect: str) -> OutputFormat:
    for form, signs in _SIGNS:
        if all(sign in template for sign in signs):
            return form
    if dialect == _CHANNEL_DIALECT:
        return HARMONY
    return UNKNOWN if _TOOLS.search(template) else NONE


def _thinking(template: str, dialect: str) -> Thinking | None:
    if _BRACKETS.begin in template:
        return _BRACKETS
    if _THINK.end in template or dialect in _TAG_DIALECTS:
        return _THINK
    return None
