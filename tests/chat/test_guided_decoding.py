"""Which tokens a grammar allows, over a small vocabulary with all that real ones have."""

import json
import time
from collections.abc import Iterator

import jsonschema_rs
import numpy as np
import pytest

from exo.worker.protocol.commands import Grammar
from exo.worker.runner_common.grammar.guided_decoding import GrammarCompiler, GrammarError, GrammarState

BYTES = [bytes([byte]) for byte in range(256)]
"""Byte fallback, as SentencePiece has it, or the smallest tokens of byte-level BPE."""
PIECES = [
    b"a",
    b"ab",
    b"abc",
    b"<|end",
    b"|>",
    b'{"',
    b'":',
    b" ",
    b"  ",
    "é".encode(),
    "é".encode()[:1],
    b"\xff\xfe",
    b"",
]
CONTROL = [b"<|end|>", b"<|call|>", b"<|eot|>", b"[INST]", b""]
VOCABULARY = [*BYTES, *PIECES, *CONTROL]
FIRST_CONTROL = len(BYTES) + len(PIECES)
END, CALL, EOT, INST = range(FIRST_CONTROL, FIRST_CONTROL + 4)
EOG = (END, EOT)
N_VOCAB = len(VOCABULARY) + 3
"""Some models' logits are wider than their vocabulary."""


def piece(token: int) -> bytes:
    return VOCABULARY[token] if token < len(VOCABULARY) else b""


@pytest.fixture(scope="module")
def constraints() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(piece, lambda token: FIRST_CONTROL <= token < len(VOCABULARY), EOG, N_VOCAB)
    yield made
    made.close()


def lark(source: str) -> Grammar:
    return Grammar(syntax="lark", source=source)


def regex(source: str) -> Grammar:
    return Grammar(syntax="regex", source=source)


def schema(value: object) -> Grammar:
    return Grammar(syntax="json_schema", source=json.dumps(value))


def allowed(constraint: GrammarState) -> set[int]:
    mask = constraint.mask()
    assert mask.shape == (N_VOCAB,)
    return set(np.flatnonzero(mask).tolist())


def spelt(*texts: bytes) -> set[int]:
    return {token for token in range(len(VOCABULARY)) if piece(token) in texts and token < FIRST_CONTROL}


def take(constraint: GrammarState, text: bytes) -> GrammarState:
    for byte in text:
        constraint.accept(byte)
    return constraint


def test_every_token_that_spells_what_may_come_next_is_allowed(constraints: GrammarCompiler) -> None:
    constraint = constraints.compile(regex("abc?"))
    assert allowed(constraint) == spelt(b"a", b"ab", b"abc")
    constraint.accept(len(BYTES) + 1)
    assert allowed(constraint) == spelt(b"c") | set(EOG)
    assert not constraint.finished
    constraint.accept(ord("c"))
    assert constraint.finished


def test_where_one_text_alone_can_follow_any_way_to_spell_it_is_allowed(constraints: GrammarCompiler) -> None:
    assert allowed(constraints.compile(lark('start: "abc"'))) == spelt(b"a", b"ab", b"abc")


def test_a_character_may_come_byte_by_byte_but_nothing_that_is_no_text(constraints: GrammarCompiler) -> None:
    assert allowed(constraints.compile(regex("é"))) == spelt("é".encode(), "é".encode()[:1])
    anything = allowed(constraints.compile(regex("(.|\\n)+")))
    assert 0xFF not in anything
    assert not any(piece(token)[:1] == b"\xff" for token in anything)
    assert take(constraints.compile(regex("é")), "é".encode()).finished


def test_text_that_reads_like_a_control_token_is_text(constraints: GrammarCompiler) -> None:
    constraint = constraints.compile(lark('start: "<|end|>"'))
    assert allowed(constraint) == spelt(b"<", b"<|end")
    assert take(constraint, b"<|end|>").finished


@pytest.mark.parametrize(("reference", "token"), [("<|call|>", CALL), (f"<[{CALL}]>", CALL), (f"<[{INST}]>", INST)])
def test_a_control_token_is_reached_by_name_or_id(constraints: GrammarCompiler, reference: str, token: int) -> None:
    constraint = constraints.compile(lark(f'start: {reference} "a"'))
    assert allowed(constraint) == {token}
    constraint.accept(token)
    assert allowed(constraint) == spelt(b"a")


def test_all_tokens_that_end_generation_are_allowed_where_the_output_may_end(constraints: GrammarCompiler) -> None:
    constraint = constraints.compile(regex("(ab)*"))
    assert allowed(constraint) >= set(EOG)
    constraint.accept(ord("a"))
    assert allowed(constraint) == spelt(b"b")


def test_a_model_without_an_end_is_led_to_the_end_of_the_grammar() -> None:
    constraints = GrammarCompiler(piece, lambda token: token >= FIRST_CONTROL, (), N_VOCAB)
    constraint = constraints.compile(regex("ab?"))
    constraint.accept(ord("a"))
    assert np.flatnonzero(constraint.mask()).tolist() == [ord("b")]
    constraints.close()


def test_delivered_tokens_are_gone_over(constraints: GrammarCompiler) -> None:
    grammar = schema({"enum": ["abc", "abd"]})
    resumed = constraints.compile(grammar, b'"ab')
    assert allowed(resumed) == allowed(take(constraints.compile(grammar), b'"ab')) == spelt(b"c", b"d")
    assert constraints.compile(grammar, b'"abd"').finished
    with pytest.raises(GrammarError, match="delivered"):
        constraints.compile(grammar, b'"ax')


def test_a_token_that_is_not_allowed_is_not_accepted(constraints: GrammarCompiler) -> None:
    constraint = constraints.compile(regex("ab"))
    with pytest.raises(GrammarError):
        constraint.accept(ord("b"))


def test_a_mask_is_computed_ahead_and_dropped_with_the_next_token(constraints: GrammarCompiler) -> None:
    constraint = constraints.compile(regex("abc"))
    for expected in (b"a", b"b", b"c"):
        constraint.prepare()
        assert constraint.mask()[ord(expected)]
        constraint.accept(ord(expected))


@pytest.mark.parametrize(
    ("grammar", "before"),
    [
        (regex("a(b|bc)?é?"), b"a"),
        (lark('start: "a" <|call|> /b*/'), b"a"),
        (schema({"type": "object", "properties": {"a": {"type": "integer"}}}), b'{"a":'),
        (lark("start: /a*/"), b"aa"),
    ],
)
def test_what_is_said_of_one_token_is_what_the_mask_says(
    constraints: GrammarCompiler, grammar: Grammar, before: bytes
) -> None:
    told, asked = (take(constraints.compile(grammar), before) for _ in range(2))
    mask = told.mask()
    assert [asked.allows(token) for token in range(N_VOCAB)] == mask.tolist()
    assert [told.allows(token) for token in range(N_VOCAB)] == mask.tolist()


def test_json_may_have_blanks_but_not_for_ever(constraints: GrammarCompiler) -> None:
    value = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": False}
    for text in (b'{"a":null}', b'{ "a": null }', b'{\n    "a": null\n}', b'{\n\t"a" :\tnull}'):
        assert take(constraints.compile(schema(value)), text).finished
    with pytest.raises(GrammarError):
        take(constraints.compile(schema(value)), b"{" + b" " * 30)
    tight = {**value, "x-guidance": {"whitespace_flexible": False}}
    assert allowed(take(constraints.compile(schema(tight)), b"{")) == spelt(b'"')


@pytest.mark.parametrize(
    ("bounds", "yes", "no"),
    [
        ({"exclusiveMinimum": 3, "maximum": 3.5}, (b"3.1", b"3.00001", b"3.5"), (b"3", b"3.0", b"3.6")),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.001}, (b"0.0005",), (b"0", b"0.0", b"0.001")),
        ({"minimum": -2.5, "exclusiveMaximum": -2}, (b"-2.5", b"-2.1"), (b"-2", b"-2.0", b"-2.6")),
        ({"exclusiveMinimum": 3, "maximum": 5}, (b"3.1", b"4"), (b"3", b"3.0", b"5.1")),
    ],
)
def test_a_whole_number_that_is_excluded_is(
    constraints: GrammarCompiler, bounds: dict[str, float], yes: tuple[bytes, ...], no: tuple[bytes, ...]
) -> None:
    """llguidance by itself allows some of them."""
    number = {"type": "number", **bounds}
    nested = {"type": "object", "properties": {"const": number}, "required": ["const"], "additionalProperties": False}
    for text in yes:
        assert take(constraints.compile(schema(nested)), b'{"const":' + text + b"}").finished
        assert set(EOG) <= allowed(take(constraints.compile(schema(number)), text))
    for text in no:
        with pytest.raises(GrammarError):
            take(constraints.compile(schema(nested)), b'{"const":' + text + b"}")


def test_a_value_that_looks_like_a_schema_stays_as_it_is(constraints: GrammarCompiler) -> None:
    value = {"const": {"exclusiveMinimum": 3, "maximum": 3.5}}
    assert take(constraints.compile(schema(value)), b'{"exclusiveMinimum":3,"maximum":3.5}').finished


TREE = {
    "type": "object",
    "properties": {"left": {"$ref": "#/$defs/tree"}, "here": {"enum": [1, "two", None]}},
    "required": ["here"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, object]] = [
    {"type": "array", "items": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 7}, "maxItems": 3},
    {"anyOf": [{"type": "string", "pattern": "^[a-f]{2,5}$"}, {"type": "integer", "multipleOf": 7, "maximum": 100}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
    {"type": "string", "maxLength": 5},
    {"const": {"é": ["<|end|>", True]}},
    {"type": "string", "format": "date"},
]


@pytest.mark.parametrize("value", SCHEMAS)
def test_whatever_the_choices_finished_json_is_valid(constraints: GrammarCompiler, value: dict[str, object]) -> None:
    finished = 0
    for seed in range(20):
        drawn, constraint, text = np.random.default_rng(seed), constraints.compile(schema(value)), b""
        for _ in range(300):
            token = int(drawn.choice(np.flatnonzero(constraint.mask())))
            if token in EOG:
                break
            text += piece(token)
            constraint.accept(token)
            if constraint.finished:
                break
        else:
            continue
        finished += 1
        jsonschema_rs.validate(value, json.loads(text))
    assert finished > 5


MANY = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(20_000)}}
SLOW = "start: A\nA: " + " & ".join(f"/(.*\\n)*[a-z]*x{{{count}}}[^b]*/" for count in range(1, 30))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar(syntax="json_schema", source=""), "not JSON"),
        (Grammar(syntax="json_schema", source='{"minimum": NaN}'), "not JSON"),
        (Grammar(syntax="json_schema", source='{"minimum": 1e999}'), "1e999"),
        (Grammar(syntax="json_schema", source="[" * 10**6), "nested too deeply"),
        (schema(None), "must be an object"),
        (schema({"type": "wat"}), "wat"),
        (schema(False), "schema is false"),
        (schema({"not": {"minLength": 2}}), "not"),
        (schema({"$ref": "file:///etc/passwd"}), "file:///etc/passwd"),
        (schema({"$ref": "#"}), "nothing matches"),
        (schema(MANY), "too large|too long"),
        (regex("(?=a)"), "look-around"),
        (regex("(" * 10_000), "invalid regex"),
        (regex("a" * 2_000_000), "2000000 characters"),
        (lark("start: start"), "nothing matches"),
        (lark("start: " + "(" * 10_000), "too deeply nested"),
        (lark("start: <|nonsense|>"), "nonsense"),
        (lark('{"grammars": []}'), "rule"),
        (lark(SLOW), "too long"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_plain_words(
    constraints: GrammarCompiler, grammar: Grammar, reason: str
) -> None:
    with pytest.raises(GrammarError, match=reason) as refused:
        constraints.compile(grammar)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) <= 300
    assert constraints.compile(regex("a+")).mask()[ord("a")]


def test_a_grammar_that_takes_too_long_is_given_up_in_time(constraints: GrammarCompiler) -> None:
    """Of processor time this takes none here: another process is ended."""
    began = time.process_time()
    with pytest.raises(GrammarError, match="too long"):
        constraints.compile(lark(SLOW))
    assert time.process_time() - began < 0.5
