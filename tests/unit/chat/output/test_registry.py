"""Which format a model writes: from its card, or else from its chat template."""

from typing import get_args

import pytest

from exo.cards.card import ModelCard, ToolFormat
from exo.chat.output.parser import Thinking
from exo.chat.output.registry import FORMATS, output_format
from tests import DATA
from tests.support.replies import BAR

CARDS = DATA / "upstream_cards"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ messages }}", "none"),
        ("{% for tool in tools %}{{ tool }}{% endfor %}", "unknown"),
        ("<tools> within <tool_call></tool_call> XML tags", "hermes"),
        ("<tool_call>\n<function=example>\n<parameter=p>\n", "qwen3-coder"),
        ("<tool_call>{{ name }}\n<arg_key>k</arg_key>", "glm"),
        ("<|start_header_id|>{% if tools %}<|python_tag|>", "llama3"),
        ('<|start_header_id|>{{ tools }} Respond in the format {"name": x, "parameters": y}', "llama3"),
        ("[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral-array"),
        ("[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", "mistral"),
        ("<start_of_turn>{{ tools }}```tool_code", "gemma"),
        ("<start_of_turn>model\n{{ messages }}", "none"),
        ("<start_function_call>call:", "function-gemma"),
        ("<|turn>model<|tool_call>call:", "gemma4"),
        (f"<{BAR}tool▁calls▁begin{BAR}>function<{BAR}tool▁sep{BAR}>f\n```json", "deepseek-v3"),
        (f"<{BAR}tool▁calls▁begin{BAR}>f<{BAR}tool▁sep{BAR}>", "deepseek-v3.1"),
        ("<|tool_calls_section_begin|>", "kimi"),
        ("<minimax:tool_call>", "minimax"),
        ("<|start|>assistant<|channel|>final<|message|>{{ tools }}", "harmony"),
        ("{{ tools }}<|tools_prefix|>[", "apertus"),
        ("<|CHATBOT_TOKEN|>{{ tools }}<|START_ACTION|>[", "cohere"),
        ('<|CHATBOT_TOKEN|>{{ tools }}Action:```json[{"tool_name": title', "command-r"),
        ("assistant<|role_sep|>{{ tools }}function call", "gigachat3"),
        ("assistant<|role_sep|>{{ tools }}<|function_call|>", "gigachat3.1"),
        ("{{ tools }} respond only with <|tool_call|> and a list", "granite3"),
        ("<|open|>{{ tools }}<|sep|><|close|>", "kimi-k3"),
        ("{{ tools }} within <longcat_tool_call>", "longcat"),
        ("{{ tools }}<tool_calls></tool_calls><end_of_sentence>", "minimax-m1"),
        ("{{ tools }}{% set ns_token = ']<]minimax[>[' %}{{ ns_token ~ '<tool_call>' }}", "minimax-m3"),
        ("{{ tools }}<TOOLCALL>[", "nemotron"),
        ("{{ tools }} as <tool_calls>[]</tool_calls>", "tool-calls"),
        (
            f"{{{{ tools }}}}{{% set dsml = '{BAR}DSML{BAR}' %}}{{{{ '<' + dsml + 'function_calls>' }}}}",
            "deepseek-v3.2",
        ),
        (f"{{{{ tools }}}}{{% set dsml = '{BAR}DSML{BAR}' %}}{{{{ '<' + dsml + 'tool_calls>' }}}}", "deepseek-v4"),
        ("{{ tools }}<seed:tool_call>\n<function=f>\n<parameter=p>", "seed"),
        ("{% set suffix = ':opensource' %}{{ tools }}{{ '<tool_sep{}>'.format(suffix) }}", "hunyuan3"),
        ('{{ tools }}<function name="f"><param name="p">', "minicpm5"),
        ("{{ tools }} as <tool_calls>[]</tool_calls> then [BEGIN FINAL RESPONSE]", "apriel"),
        ("{{ tools }}<tool_call></tool_call></think><response></response>", "ernie"),
        ("{{ tools }}<tool_calls>[]</tool_calls></think><answer></answer>", "hunyuan"),
        ("<|start_header_id|>{{ tools }}<function=f>{}</function><|python_tag|>", "function"),
        ("{{ tools }}<|tool_call_start|>[", "lfm2"),
        ("List of tools: <|tool_list_start|>[{{ tools }}]<|tool_list_end|>", "lfm2"),
        ("<|im_start|>system List of tools: [{{ tools }}]", "lfm2"),
        ("{{ tools }}<function_calls>f()</function_calls>", "olmo3"),
        ("<|start_header_id|>{{ tools }} in the format [func_name1(x=1)]", "pythonic"),
        ('<|header_start|>{{ tools }} Respond in the format {"name": x, "parameters": y}', "llama4"),
        ("{{ tools }} make calls in a single JSON array", "xlam"),
    ],
)
def test_a_template_gives_the_format_away(template: str, name: str) -> None:
    assert output_format(template).name == name


def test_of_an_unknown_format_no_familys_markup_is_used() -> None:
    by = output_format("{{ tools }}</think>")
    assert not by.known
    assert by.begin == by.opening == by.frame == by.stray == ()
    assert by.thinking == Thinking("<think>", "</think>")


def test_a_card_has_the_last_word() -> None:
    assert output_format("<tool_call>", "llama3").name == "llama3"
    assert output_format("{{ tools }}<tool_call>", "none").name == "none"
    assert output_format(None).name == "none"


def test_cards_name_the_formats_that_there_are() -> None:
    assert set(get_args(ToolFormat)) == {"auto", *FORMATS}


@pytest.mark.parametrize(
    ("dialect", "thinking"),
    [
        ("none", None),
        ("post_last_user", Thinking("<think>", "</think>")),
        ("suffix", Thinking("<think>", "</think>")),
        ("tool_conditional", Thinking("<think>", "</think>")),
        ("channel", FORMATS["harmony"].thinking),
        ("something newer", None),
    ],
)
def test_upstreams_dialects_tell_how_reasoning_is_marked(dialect: str, thinking: Thinking | None) -> None:
    assert output_format("{{ messages }}", reasoning_dialect=dialect).thinking == thinking


def test_the_channel_dialect_does_not_hide_what_the_template_shows() -> None:
    assert output_format("<|tool_call>", reasoning_dialect="channel").name == "gemma4"


def test_formats_whose_markers_are_control_tokens_say_so() -> None:
    special = {name for name, form in FORMATS.items() if form.special}
    assert special >= {"mistral", "harmony", "kimi", "gemma4", "deepseek-v3.1", "llama3"}
    assert special.isdisjoint({"none", "hermes", "qwen3-coder", "glm", "minimax", "gemma"})


def test_every_upstream_card_has_a_format() -> None:
    dialects = {ModelCard.from_toml(path.read_text()).reasoning_dialect for path in CARDS.glob("*.toml")}
    assert dialects >= {"none", "channel", "suffix"}
    for dialect in dialects:
        assert (output_format(None, "auto", dialect).thinking is None) == (dialect == "none")
