"""GBNF as llguidance reads it: the same texts match, what is wrong is named, and nothing hostile takes long."""

import json
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager

import anyio
import pytest
from llguidance import LLMatcher, LLTokenizer

from exo.chat.grammar.gbnf import GbnfError, GbnfWorker
from exo.worker.runner_common.grammar.grammar_sandbox import LIMITS, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    """Token 0 ends generation; the token after byte b's value is b."""
    return tokenizer_of({"0": "<|end|>"}, 1, [0])


@asynccontextmanager
async def worker() -> AsyncGenerator[GbnfWorker]:
    gbnf = GbnfWorker()
    try:
        yield gbnf
    finally:
        await gbnf.aclose()


def matches(tokenizer: LLTokenizer, lark: str, text: str) -> bool:
    matcher = LLMatcher(tokenizer, json.dumps({"grammars": [{"lark_grammar": lark}]}), log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    tokens = [1 + byte for byte in text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


GRAMMARS: list[tuple[str, Collection[str], Collection[str]]] = [
    ('root ::= "yes" | "no"', ["yes", "no"], ["", "maybe", "yesno"]),
    ('root ::= "a" |\n  "b"', ["a", "b"], ["ab"]),
    ('root ::= ("ab"){2} "c"{1,} "d"{2,3} "e"?', ["ababcdd", "ababcccddde"], ["abcdd", "ababcd", "ababcdddd"]),
    ("root ::= [a-cx]+ [^a-z]", ["abcx1", "aé", "a\n"], ["ab", "d1"]),
    (r'root ::= "\"\\\n\t" [\]\\"]', ['"\\\n\t]', '"\\\n\t"'], ['"\\\n\ta']),
    (r'root ::= "\x41\u00e9\U0001F600\u4e2d"', ["Aé😀中"], ["A"]),
    (r"root ::= [\u00e0-\u00fc\U0001F600]+", ["é😀ü"], ["e"]),
    (r'root ::= "[\[\]]" [\[/]', ["[[]][", "[[]]/"], ["[[]]x"]),
    ('root ::= [a&&b~~]+ "&&"', ["a&b~&&"], ["c&&"]),
    ('root ::= "a\nb"', ["a\nb"], ["ab"]),
    ('# "not [read\nroot ::= "#" # nor this: \\q', ["#"], [""]),
    ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["((x)", "()"]),
    ('root ::= my-rule+\nmy-rule ::= item "," \nitem ::= [0-9]+', ["1,23,"], [",", "1"]),
    ('root ::= "" | "x"', ["", "x"], ["xx"]),
]


@pytest.mark.parametrize(("source", "yes", "no"), GRAMMARS)
async def test_the_same_texts_match(
    tokenizer: LLTokenizer, source: str, yes: Collection[str], no: Collection[str]
) -> None:
    async with worker() as gbnf:
        lark = await gbnf.lark(source)
    assert [text for text in yes if not matches(tokenizer, lark, text)] == []
    assert [text for text in no if matches(tokenizer, lark, text)] == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "No 'root' rule"),
        ('start ::= "a"', "No 'root' rule"),
        ("root ::= nope", "Rule 'nope' not found"),
        ('root ::= "a', "end of input at line 1"),
        ("root ::= [a", "end of input at line 1"),
        ('root ::= "a"\nx = "b"', "Expected ::= at line 2"),
        ('root ::= ("a"', r"Expected '\)'"),
        ('root ::= "a"{2', "Expected ',' or '}'"),
        (r'root ::= "\q"', r"Invalid escape sequence \\q"),
        (r'root ::= "\xZZ"', r"Invalid \\x escape"),
        (r'root ::= "\ud800"', r"no character \\ud800"),
        (r'root ::= "\U00110000"', "range"),
        ("root ::= \0", "Expected name"),
    ],
)
async def test_what_is_wrong_is_named(source: str, says: str) -> None:
    async with worker() as gbnf:
        with pytest.raises(GbnfError, match=says) as refused:
            await gbnf.lark(source)
    assert str(refused.value).startswith("it is not GBNF: ")
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize(
    "source",
    [
        "root ::= " + "(" * 10**6,
        "root ::= " + "(" * 10**6 + '"a"' + ")" * 10**6,
        "root ::= " + "[" * 10**6,
        "root ::= " + '"a" | ' * 10**6 + '"b"',
        "".join(f'r{number} ::= "a"\n' for number in range(10**5)),
        "(" * 10**6,
    ],
    ids=["open", "nested", "classes", "alternatives", "rules", "no rule"],
)
async def test_hostile_grammars_are_refused_in_a_moment_and_the_next_one_is_read(source: str) -> None:
    async with worker() as gbnf:
        await gbnf.lark('root ::= "up"')
        with anyio.fail_after(60), pytest.raises(GbnfError):  # much longer without a limit
            await gbnf.lark(source)
        assert "yes" in await gbnf.lark('root ::= "yes"')
