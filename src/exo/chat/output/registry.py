"""The output format of a model: from its card, or recognised in its chat template.

Use, for each request::

    form = output_format(model.chat_template, card.tool_format, card.reasoning_dialect)
    prompt = await chat_prompt(worker, model, messages, tools=[tool.definition() for tool in tools])
    inside = form.starts_in_reasoning("".join(text.text for text in prompt))
    grammar = form.call_grammar(tools, parallel=True, special_tokens=ids, in_reasoning=inside)  # to force a call
    parser = form.parser(tools=tools, in_reasoning=inside)
    parts = parser.push("text as it arrives")
    parts += parser.finish()
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from exo.chat.output.format import OutputFormat
from exo.chat.output.formats import harmony, json_calls, kimi_k3, minimax_m3, python_calls, tags
from exo.chat.output.parser import OutputParser, Thinking

__all__ = ["FORMATS", "OutputFormat", "OutputParser", "output_format"]

_FAMILIES = (harmony, json_calls, kimi_k3, minimax_m3, python_calls, tags)
FORMATS: Mapping[str, OutputFormat] = {
    form.name: form for form in (OutputFormat("none"), *(form for family in _FAMILIES for form in family.FORMATS))
}
"""Every format by name. "none" has no calls, but may have reasoning."""

# Each format with texts that its models' chat templates contain. The order matters: the first match counts, and some
# formats share their markers.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>",)),
    ("function-gemma", ("<start_function_call>",)),
    ("kimi", ("<|tool_calls_section_begin|>",)),
    ("kimi-k3", ("<|open|>", "<|sep|>")),
    ("deepseek-v3.2", ("\uff5cDSML\uff5c", "function_calls>")),
    ("deepseek-v4", ("\uff5cDSML\uff5c",)),
    ("seed", ("<seed:tool_call>",)),
    ("hunyuan3", ("<tool_sep", ":opensource")),
    ("minicpm5", ('<function name="', '<param name="')),
    ("apertus", ("<|tools_prefix|>",)),
    ("cohere", ("<|START_ACTION|>",)),
    ("command-r", ("<|CHATBOT_TOKEN|>", "Action:", '"tool_name"')),
    ("gigachat3.1", ("<|function_call|>", "<|role_sep|>")),
    ("gigachat3", ("function call", "<|role_sep|>")),
    ("nemotron", ("<TOOLCALL>",)),
    ("minimax-m3", ("]<]minimax[>[",)),
    ("minimax-m1", ("<tool_calls>", "<end_of_sentence>")),
    ("apriel", ("<tool_calls>", "[BEGIN FINAL RESPONSE]")),
    ("hunyuan", ("<tool_calls>", "<answer>", "</answer>")),
    ("tool-calls", ("<tool_calls>[",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("lfm2", ("List of tools: [", "<|im_start|>")),
    ("olmo3", ("<function_calls>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama4", ("<|header_start|>", "tools", '"parameters"')),
    ("xlam", ("calls in a single JSON array",)),
    ("deepseek-v3", ("<\uff5ctool▁calls▁begin\uff5c>", "```json")),
    ("deepseek-v3.1", ("<\uff5ctool▁calls▁begin\uff5c>",)),
    ("mistral", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral-array", ("[TOOL_CALLS]",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("glm", ("<tool_call>", "<arg_key>")),
    ("qwen3-coder", ("<tool_call>", "<function=", "<parameter=")),
    ("ernie", ("<tool_call>", "<response>", "</think>")),
    ("hermes", ("<tool_call>",)),
    ("function", ("<function=", "</function>")),
    ("llama3", ("<|python_tag|>",)),
    ("granite3", ("<|tool_call|>",)),
    ("gemma", ("tool_code",)),
    ("gemma", ("<start_of_turn>", "tools", '"parameters"')),
    ("llama3", ("<|start_header_id|>", "tools", '"parameters"')),
)
_TOOLS = re.compile(r"\btools\b")

_THINK = Thinking("<think>", "</think>")
_BRACKETS = Thinking("[THINK]", "[/THINK]")
# Upstream's names for how a chat template takes earlier reasoning back, which also imply how the model marks it.
_TAG_DIALECTS = ("post_last_user", "suffix", "tool_conditional")
_CHANNEL_DIALECT = "channel"


@lru_cache(maxsize=64)
def output_format(template: str | None, tool_format: str = "auto", reasoning_dialect: str = "none") -> OutputFormat:
    """Returns the format that a card names, or else the one recognised in the chat template.

    A template that reads ``tools`` without a known format's markers has a format that is not ``known``. Raises
    ``KeyError`` for a ``tool_format`` that is neither "auto" nor in ``FORMATS``.
    """
    source = template or ""
    form = _recognised(source, reasoning_dialect) if tool_format == "auto" else FORMATS[tool_format]
    thinking = form.thinking
    if thinking is None and _BRACKETS.begin in source:
        thinking = _BRACKETS
    elif thinking is None and (_THINK.end in source or reasoning_dialect in _TAG_DIALECTS):
        thinking = _THINK
    return replace(form, thinking=thinking, special=form.special or thinking == _BRACKETS)


def _recognised(template: str, dialect: str) -> OutputFormat:
    for name, signs in _SIGNS:
        if all(sign in template for sign in signs):
            return FORMATS[name]
    if dialect == _CHANNEL_DIALECT:
        return FORMATS["harmony"]
    return json_calls.UNKNOWN if _TOOLS.search(template) else FORMATS["none"]
