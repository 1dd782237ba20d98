"""Output that must match a grammar: which tokens may come next, by llguidance over the model's own vocabulary.

The same in every runner, so that twins allow the same tokens. A grammar is about the text: whichever tokens spell it
are allowed. A control token has no text here; a grammar reaches it by name, ``<|im_end|>``, or by id, ``<[106]>``.
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer
from pydantic import JsonValue

from exo.worker.grammar_trial import LIMITS, Trial, Vocabulary
from exo.worker.messages import Failed, Grammar

Mask = npt.NDArray[np.bool_]

LONGEST_SOURCE = 1 << 20
"""Characters."""

WHITESPACE = r"[ \t\n]{0,20}"
"""Between the parts of JSON, unless the schema says otherwise: a model that may go on with blanks for ever does."""

_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_VALUES = ("const", "enum", "default", "examples")
"""Keywords of a JSON Schema that hold schemas by name, and those that hold no schema."""
_STEP = 1e-6

_CONTROL = b"\xff"
"""llguidance's mark of a control token. No text has this byte."""
_BY_TEXT_ALONE = '\n%llguidance {"no_forcing": true}'
"""Where only one text can follow, llguidance would else allow only the tokens of its own choice for it."""
_LINE_OF_SOURCE = re.compile(r"\s*\d+ \| ")
_DEAD_END = "NoExtension"
"""How llguidance says that no token is allowed."""


class GrammarError(Exception):
    """The grammar cannot be used, or not any further; the message says why, for the client."""


def grammar_failure(request: str, error: GrammarError) -> Failed:
    """The end of a request whose grammar cannot be used."""
    return Failed(id=request, code="invalid_request", message=f"grammar: {error}", param="grammar")


@final
class Constraints:
    """Compiles grammars for one loaded model, in one thread."""

    def __init__(
        self, pieces: Callable[[int], bytes], is_control: Callable[[int], bool], eog: Collection[int], n_vocab: int
    ) -> None:
        """``pieces`` gives what a token adds to the text, or a control token's text; ``eog`` ids end generation."""
        special = {token: pieces(token) for token in range(n_vocab) if is_control(token) or token in eog}
        # Ids beyond the vocabulary are in no mask.
        ends = sorted(eog) or [n_vocab]
        self._trial = Trial(special, n_vocab, ends)
        self._special = special
        self._ends = ends
        self._pieces = pieces
        self._n_vocab = n_vocab
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="mask")

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made for the first grammar that passes its trial.

        It takes a second for 262,144 tokens, most of which holds the interpreter.
        """
        special, ends, n_vocab, pieces = self._special, self._ends, self._n_vocab, self._pieces
        tokens = [b"" if token in special else pieces(token) for token in range(max(n_vocab, ends[-1] + 1))]
        tokens = [b"" if piece.startswith(_CONTROL) else piece for piece in tokens]
        for token, text in special.items():
            tokens[token] = text
        return Vocabulary(tokens, [token for token in special if tokens[token]], ends[0]).build(ends)

    def compile(self, grammar: Grammar, delivered: Sequence[int] = ()) -> "Constraint":
        """The constraint of one sequence whose output so far is ``delivered``. Raises GrammarError.

        Takes a second or two at the most, and leaves the interpreter free meanwhile.
        """
        source = _for_llguidance(grammar)
        if wrong := self._trial.run(source):
            raise GrammarError(_readable(wrong))
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(_readable(matcher.get_error()))
        if not matcher.consume_tokens(list(delivered)):
            raise GrammarError("the tokens delivered do not match it")
        constraint = Constraint(matcher, self._n_vocab, self._threads)
        if not constraint.finished:
            constraint.mask()
        return constraint

    def close(self) -> None:
        """Ends what it has started."""
        self._threads.shutdown()
        self._trial.close()


@final
class Constraint:
    """What one sequence may go on with. For one thread at a time; masks are computed in others."""

    def __init__(self, matcher: LLMatcher, n_vocab: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._n_vocab = n_vocab
        self._threads = threads
        self._next: Future[Mask] | None = None
        self._finished = matcher.is_stopped()
        self.spared = False
        """Whether the last token asked about was allowed, so that it took no mask, and the next may take none."""

    @property
    def finished(self) -> bool:
        """The output matches, and nothing but an end can follow."""
        return self._finished

    def prepare(self) -> None:
        """Starts computing the next mask in another thread, where that is not done yet."""
        if self._next is None:
            self._next = self._threads.submit(self._compute)

    def mask(self) -> Mask:
        """Shape (n_vocab,), true for the tokens allowed next; where the output may end, all that end generation are.

        Waits for what ``prepare`` began. Raises GrammarError.
        """
        self.prepare()
        assert self._next is not None
        return self._next.result()

    def allows(self, token: int) -> bool:
        """What ``mask`` says of one token, without computing it unless that was begun. Raises GrammarError."""
        begun = self._next
        self.spared = self._matcher.validate_tokens([token]) == 1 if begun is None else bool(begun.result()[token])
        return self.spared

    def accept(self, token: int) -> None:
        """Goes on past a token. Raises GrammarError if it is not allowed."""
        if self._next is not None:
            self._next.exception()  # the matcher is for one thread at a time
            self._next = None
        if not self._matcher.consume_token(token):
            raise GrammarError(_readable(self._matcher.get_error()))
        self._finished = self._matcher.is_stopped()

    def _compute(self) -> Mask:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(_readable(self._matcher.get_error()))
        return np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)


def _for_llguidance(grammar: Grammar) -> str:
    """Raises GrammarError."""
    if len(grammar.source) > LONGEST_SOURCE:
        raise GrammarError(f"it has {len(grammar.source)} characters; at most {LONGEST_SOURCE} are taken")
    match grammar.syntax:
        case "json_schema":
            parts: list[JsonValue] = [
                {"lark_grammar": "start: @schema" + _BY_TEXT_ALONE},
                {"name": "schema", "json_schema": _schema(grammar.source)},
            ]
        case "regex":
            written = json.loads(LLMatcher.grammar_from_regex(grammar.source))
            parts = [{"lark_grammar": written["grammars"][0]["lark_grammar"] + _BY_TEXT_ALONE}]
        case "lark":
            parts = [{"lark_grammar": grammar.source + _BY_TEXT_ALONE}]
    return json.dumps({"grammars": parts})


def _schema(source: str) -> JsonValue:
    """Raises GrammarError for what is no JSON Schema at first sight."""
    try:
        schema = _apart(json.loads(source, parse_constant=_number, parse_float=_number))
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"it is not JSON: {error}") from None
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarError("a JSON Schema must be an object, true or false")
    given = schema.get("x-guidance", {})
    if isinstance(given, dict) and not given.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        schema["x-guidance"] = {"whitespace_pattern": WHITESPACE, **given}
    return schema


def _apart(schema: JsonValue) -> JsonValue:
    """The schema with a small step away from every whole number that is excluded, where the other bound is near.

    llguidance takes {"exclusiveMinimum": 3, "maximum": 3.5} to allow 3.
    """
    if isinstance(schema, list):
        return [_apart(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, JsonValue] = {}
    for key, value in schema.items():
        if key in _OF_SCHEMAS and isinstance(value, dict):
            made[key] = {name: _apart(each) for name, each in value.items()}
        else:
            made[key] = value if key in _OF_VALUES else _apart(value)
    for excluded, limits, end in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), math.inf),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -math.inf),
    ):
        bound = _numeric(made.get(excluded))
        other = _numeric(next((made[limit] for limit in limits if limit in made), None))
        if bound is not None and other is not None and bound == round(bound) and 0 < abs(other - bound) < 1:
            step = bound + (other - bound) * _STEP
            made[excluded] = step if step != bound else math.nextafter(bound, end)
    return made


def _numeric(value: JsonValue) -> float | None:
    """A number that may have another one less than 1 away from it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1 << 53 else None


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that can be used")
    return number


def _readable(error: str) -> str:
    """The finding on one line, without the lines of source around it."""
    if error.startswith(_DEAD_END):
        return "no token can follow, so nothing matches it"
    lines = error.removesuffix("<non-verbose/>").splitlines()
    shown = next((at for at, line in enumerate(lines) if _LINE_OF_SOURCE.match(line)), len(lines))
    text = " ".join(" ".join(lines[:shown]).split())
    return text if len(text) <= 300 else text[:297] + "..."
