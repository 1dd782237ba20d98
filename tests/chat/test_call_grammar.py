"""Grammars that force calls, against llguidance itself: what they allow is what the parsers read, and validates."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from pydantic import JsonValue

from exo.chat.grammar.tool_schema import Tool
from exo.chat.output.events import Arguments, Content, Part, Reasoning, ToolCall
from exo.chat.output.format import OutputFormat
from exo.chat.output.registry import FORMATS
from exo.worker.protocol.commands import Grammar
from tests.support.replies import BAR, ONE_CALL, THE_CALL, TOOLS, form, read, text_of

NAMES = sorted(ONE_CALL)
MARKERS = tuple(
    sorted(
        {
            marker
            for name in NAMES
            for marker in form(name).begin
            if "<|open|>" not in marker and "minimax[" not in marker
        }
        | {
            "</tool_call>",
            "[ARGS]",
            "</think>",
            "<escape>",
            '<|"|>',
            "<|channel|>",
            "<|message|>",
            "<|end|>",
            "<|start|>",
        }
        | {
            "<|constrain|>",
            "<|open|>",
            "<|close|>",
            "<|sep|>",
            "]<]minimax[>[",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<channel|>",
            "</arg_value>",
        }
    )
)

ENDS = (
    *('"', "]", "}", "</parameter>", "</arg_value>", "<escape>", '<|"|>', "<|close|>argument<|sep|>", "]<]minimax[>["),
    *(f"</{BAR}DSML{BAR}parameter>", "</arg_value:opensource>", "</param>"),
)
"""What a random walk would hardly ever write, and has to write to get on."""


class Vocabulary:
    """A token for each byte, an end, and control tokens."""

    def __init__(self, special: Sequence[str]) -> None:
        self.special = {text: 257 + at for at, text in enumerate(special)}
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>", *(text.encode() for text in special)]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = 256
        self.bos_token_id = None
        self.tokenizer = LLTokenizer(TokenizerWrapper(self), n_vocab=len(self.tokens))

    def __call__(self, text: bytes | str) -> list[int]:
        """Bytes."""
        return list(text.encode() if isinstance(text, str) else text)

    def encode(self, text: str) -> list[int]:
        """The tokens of ``text``, control tokens where it has any."""
        ids: list[int] = []
        while text:
            marker = next((marker for marker in self.special if text.startswith(marker)), None)
            ids += [self.special[marker]] if marker else text[0].encode()
            text = text[len(marker or text[0]) :]
        return ids

    def matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), (matcher.get_error(), grammar)
        return matcher

    def accepts(self, grammar: str, text: str) -> bool:
        matcher = self.matcher(grammar)
        ids = self.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def walk(self, grammar: str, seed: int, longest: int = 600) -> str | None:
        """A text that the grammar allows, drawn at random; None if it does not end."""
        draw = random.Random(seed)
        matcher = self.matcher(grammar)
        ids: list[int] = []
        while len(ids) < longest:
            allowed = self._allowed(matcher)
            if not allowed or (self.eos_token_id in allowed and draw.random() < 0.5):
                break
            printable = [token for token in allowed if token == 10 or 32 <= token < 127 or token > self.eos_token_id]
            end = self.encode(draw.choice(ENDS)) if draw.random() < 0.4 else []
            if not end or matcher.validate_tokens(end) < len(end):
                end = [draw.choice(printable or allowed)]
            if end == [self.eos_token_id]:
                break
            assert matcher.try_consume_tokens(end) == len(end)
            ids += end
        if not matcher.is_accepting():
            return None
        return b"".join(self.tokens[token] for token in ids).decode()

    def _allowed(self, matcher: LLMatcher) -> list[int]:
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: len(self.tokens)]
        return np.nonzero(bits)[0].tolist()


PLAIN, CONTROL = Vocabulary(()), Vocabulary(MARKERS)
VOCABULARIES = pytest.mark.parametrize("words", [PLAIN, CONTROL], ids=["plain", "control"])


def grammar_of(by: OutputFormat, words: Vocabulary, tools: Sequence[Tool] = TOOLS, *, parallel: bool = False) -> str:
    return by.call_grammar(tools, parallel=parallel, special_tokens=words.special)


def as_written(name: str) -> str:
    """The example, in the one way of several that the grammar writes."""
    text = ONE_CALL[name].replace("'Paris'", '"Paris"')
    return text.removesuffix("<|call|>")


@VOCABULARIES
@pytest.mark.parametrize("name", NAMES)
def test_a_right_call_is_allowed_and_a_wrong_one_is_not(name: str, words: Vocabulary) -> None:
    grammar = grammar_of(FORMATS[name], words)
    right = as_written(name)
    assert words.accepts(grammar, right)
    assert not words.accepts(grammar, right.replace("3", "x"))
    assert not words.accepts(grammar, right.replace("get_weather", "get_whether"))
    assert not words.accepts(grammar, right.replace("city", "town"))
    assert not words.accepts(grammar, right[:-1])
    assert not words.accepts(grammar, "Hello")


def sectioned(between: str) -> Callable[[str], str]:
    """For the formats in which all calls are inside one pair of markers."""

    def twice(one: str) -> str:
        begin = one[: one.index(">") + 1]
        end = one[one.rindex("<") :]
        inside = one.removeprefix(begin).removesuffix(end)
        return begin + inside + between + inside + end

    return twice


def in_array(between: str) -> Callable[[str], str]:
    """For the formats in which all calls are in one array."""

    def twice(one: str) -> str:
        inside = one[one.index("[") + 1 : one.rindex("]")]
        return one.replace(inside, f"{inside.rstrip()}{between}{inside}")

    return twice


DSML = f"{BAR}DSML{BAR}"


def between(first: str, after: str) -> Callable[[str], str]:
    """For the formats in which calls stand one after the other: from the text ``first`` up to ``after``."""

    def twice(one: str) -> str:
        call = one[one.index(first) : one.index(after)]
        return one.replace(call, call + call)

    return twice


def in_list(one: str) -> str:
    """For the formats in which all calls are in one list."""
    call = one[one.index("get_weather") : one.rindex("]")]
    return one.replace(call, f"{call}, {call}")


def on_lines(one: str) -> str:
    """For the formats in which each call is on a line of its own, inside one pair of markers."""
    call = one[one.index("\n") : one.rindex("\n")]
    return one.replace(call, call + call)


TWO_CALLS: Mapping[str, Callable[[str], str]] = {
    "hermes": lambda one: f"{one}\n{one}",
    "qwen3-coder": lambda one: f"{one}\n{one}",
    "glm": lambda one: f"{one}\n{one}",
    "minimax": between("<invoke", "</minimax"),
    "deepseek-v3.2": between(f"<{DSML}invoke", f"</{DSML}function_calls"),
    "deepseek-v4": between(f"<{DSML}invoke", f"</{DSML}tool_calls"),
    "hunyuan3": between("<tool_call:", "</tool_calls:"),
    "minicpm5": lambda one: f"{one}\n{one}",
    "seed": lambda one: f"{one}\n{one}",
    "llama3": lambda one: f"{one}; {one}",
    "mistral": lambda one: one + one,
    "mistral-array": lambda one: f"{one[:-1]}, {one.removeprefix('[TOOL_CALLS][')}",
    "gemma": lambda one: one.replace("\n```", "\n" + one.split("\n")[1] + "\n```"),
    "function-gemma": lambda one: one + one,
    "gemma4": lambda one: one + one,
    "deepseek-v3": sectioned("\n"),
    "deepseek-v3.1": sectioned(""),
    "kimi": sectioned(""),
    "apertus": in_array(", "),
    "apriel": in_array(", "),
    "hunyuan": in_array(", "),
    "ernie": lambda one: f"{one}\n{one}",
    "cohere": in_array(","),
    "command-r": in_array(","),
    "granite3": in_array(", "),
    "nemotron": in_array(", "),
    "tool-calls": in_array(", "),
    "olmo3": on_lines,
    "pythonic": in_list,
    "xlam": in_array(", "),
    "llama4": lambda one: f"{one}; {one}",
    "lfm2": in_list,
    "longcat": on_lines,
    "minimax-m1": on_lines,
    "minimax-m3": between("]<]minimax[>[<invoke", "]<]minimax[>[</tool_call"),
    "kimi-k3": between("<|open|>call", "<|close|>tools"),
}


@VOCABULARIES
@pytest.mark.parametrize("name", sorted(TWO_CALLS))
def test_several_calls_only_where_they_are_allowed(name: str, words: Vocabulary) -> None:
    one = as_written(name)
    two = TWO_CALLS[name](one)
    assert not words.accepts(grammar_of(FORMATS[name], words), two)
    assert words.accepts(grammar_of(FORMATS[name], words, parallel=True), two)
    assert read(form(name), [two])[:2] == THE_CALL
    assert len(read(form(name), [two])) == 4


def test_a_marker_that_is_a_control_token_is_written_by_its_token_alone() -> None:
    text = as_written("hermes")
    spelled = list(text.encode())
    matcher = CONTROL.matcher(grammar_of(FORMATS["hermes"], CONTROL))
    assert matcher.try_consume_tokens(spelled) == 0


SCHEMAS: Mapping[str, dict[str, JsonValue]] = {
    "texts": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["b"]},
    "numbers": {
        "type": "object",
        "properties": {"i": {"type": "integer", "minimum": 3, "maximum": 12}, "n": {"type": "number"}},
        "required": ["i"],
    },
    "texts that look like numbers": {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "^[0-9]{3}$"}, "b": {"type": ["string", "integer"]}},
        "required": ["a", "b"],
    },
    "choices": {
        "type": "object",
        "properties": {"a": {"enum": ["x", "7", "true"]}, "b": {"enum": [1, "1", None]}, "c": {"const": "<x>"}},
        "required": ["a", "b", "c"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "p": {"$ref": "#/$defs/point"},
            "l": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "boolean"}]}, "maxItems": 2},
        },
        "required": ["p", "l"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "name": {"type": "string", "maxLength": 4}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
    "nothing": {"type": "object", "properties": {}, "additionalProperties": False},
}


def called(parts: Sequence[Part]) -> Iterator[tuple[str, JsonValue]]:
    for part in parts:
        if isinstance(part, ToolCall):
            text = "".join(p.text for p in parts if isinstance(p, Arguments) and p.index == part.index)
            yield part.name, json.loads(text, parse_float=lambda number: max(-1e300, min(float(number), 1e300)))


@VOCABULARIES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", sorted(SCHEMAS))
def test_whatever_the_grammar_allows_is_read_and_validates(name: str, kind: str, words: Vocabulary) -> None:
    tools = (Tool("first", "", SCHEMAS[kind]), Tool("first_too", "", SCHEMAS[kind]))
    grammar = grammar_of(FORMATS[name], words, tools, parallel=True)
    ended = 0
    for seed in range(20):
        text = words.walk(grammar, seed)
        if text is None:
            continue
        ended += 1
        parts = read(FORMATS[name], [text], tools)
        assert text_of(parts, Content) == "", text
        found = list(called(parts))
        assert found, text
        for tool_name, arguments in found:
            assert tool_name in ("first", "first_too")
            jsonschema_rs.validate(SCHEMAS[kind], arguments)
        if ended == 2:
            break
    assert ended


@VOCABULARIES
@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_begins_inside_reasoning_may_end_it_before_the_call(name: str, words: Vocabulary) -> None:
    by = form(name)
    assert by.thinking is not None
    grammar = by.call_grammar(TOOLS, parallel=False, special_tokens=words.special, in_reasoning=True)
    between = "<|start|>assistant" if name == "harmony" else "\n\n"
    text = f"First, look.{by.thinking.end}{between}{as_written(name)}"
    assert words.accepts(grammar, text)
    assert read(by, text, in_reasoning=True) == [Reasoning("First, look."), *THE_CALL]


def test_harmony_may_reason_before_a_call() -> None:
    text = f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{as_written('harmony')}"
    assert CONTROL.accepts(grammar_of(FORMATS["harmony"], CONTROL), text)


@VOCABULARIES
@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (Grammar(syntax="json_schema", source='{"type": "object", "maxProperties": 0}'), "{}", "[]"),
        (Grammar(syntax="regex", source=r"a/b\/[0-9]+\n?"), "a/b/12\n", "a/b"),
        (Grammar(syntax="lark", source='start: word+\nword: "{x}" | /y/\n'), "{x}y", "z"),
    ],
)
def test_a_clients_grammar_may_hold_for_what_follows_reasoning(
    grammar: Grammar, right: str, wrong: str, words: Vocabulary
) -> None:
    after = form("hermes").after_reasoning(grammar, special_tokens=words.special)
    assert after.syntax == "lark"
    assert words.accepts(after.source, f"Hm{{.</think>\n\n{right}")
    assert not words.accepts(after.source, f"Hm{{.</think>\n\n{wrong}")
    assert not words.accepts(after.source, right)
    assert form("hermes").after_reasoning(grammar, special_tokens=words.special, in_reasoning=False) == grammar


def test_in_harmony_content_has_a_header() -> None:
    grammar = Grammar(syntax="regex", source="[0-9]+")
    after = FORMATS["harmony"].after_reasoning(grammar, special_tokens=CONTROL.special, in_reasoning=False)
    assert CONTROL.accepts(after.source, "<|channel|>final<|message|>12")
    assert read(FORMATS["harmony"], "<|channel|>final<|message|>12") == [Content("12")]
    assert not CONTROL.accepts(after.source, "12")


@pytest.mark.parametrize("name", ["qwen3-coder", "glm", "minimax", "gemma", "gemma4", "function-gemma"])
def test_a_schema_that_arguments_one_by_one_cannot_follow_is_refused_by_name(name: str) -> None:
    tool = Tool("f", "", {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]})
    with pytest.raises(ValueError, match="'anyOf' at the top of the schema of 'f'"):
        grammar_of(FORMATS[name], PLAIN, [tool])
    odd = Tool("f", "", {"type": "object", "properties": {"a b": {}}})
    with pytest.raises(ValueError, match="'a b'"):
        grammar_of(FORMATS[name], PLAIN, [odd])


def test_where_there_are_no_calls_none_can_be_forced() -> None:
    with pytest.raises(ValueError, match="no tool calls"):
        grammar_of(FORMATS["none"], PLAIN)
