"""Guided decoding: the tokens that a grammar allows next, computed by llguidance over the model's vocabulary.

All runners share this, so that they allow the same tokens. A grammar describes text, and all tokens that spell the text
are allowed. A control token has no text. A grammar refers to it by name, ``<|im_end|>``, or by id, ``<[106]>``.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import final

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer
from pydantic import JsonValue

from exo.worker.protocol.commands import Grammar
from exo.worker.protocol.events import Failed
from exo.worker.runner_common.grammar.grammar_errors import explain
from exo.worker.runner_common.grammar.grammar_sandbox import LIMITS, GrammarSandbox, GuidanceVocabulary
from exo.worker.runner_common.grammar.json_schema import LONGEST_SOURCE, enforced, guided
from exo.worker.runner_common.grammar.schema_keywords import SchemaError

Mask = npt.NDArray[np.bool_]

_CONTROL = b"\xff"
"""llguidance's prefix of a control token. No text has this byte."""
_BY_TEXT_ALONE = '\n%llguidance {"no_forcing": true}'
"""Without this option, if only one text can follow, llguidance allows only its own tokenization of it."""


class GrammarError(Exception):
    """The grammar cannot be used, or cannot be continued. The message is for the client."""


def grammar_failure(request: str, error: GrammarError) -> Failed:
    """Returns the terminal event of a request whose grammar cannot be used."""
    return Failed(id=request, code="invalid_request", message=f"grammar: {error}", param="grammar")


@final
class GrammarCompiler:
    """Compiles grammars for one loaded model, in one thread."""

    def __init__(
        self, pieces: Callable[[int], bytes], is_control: Callable[[int], bool], eog: Collection[int], n_vocab: int
    ) -> None:
        """``pieces`` returns the bytes of a token, or a control token's text. ``eog`` are ids that end generation."""
        special = {token: pieces(token) for token in range(n_vocab) if is_control(token) or token in eog}
        # An id beyond the vocabulary is in no mask.
        ends = sorted(eog) or [n_vocab]
        self._sandbox = GrammarSandbox(special, n_vocab, ends)
        self._special = special
        self._ends = ends
        self._pieces = pieces
        self._n_vocab = n_vocab
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="mask")

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made for the first grammar that compiles in the sandbox.

        It takes a second for 262,144 tokens, most of which holds the interpreter.
        """
        special, ends, n_vocab, pieces = self._special, self._ends, self._n_vocab, self._pieces
        tokens = [b"" if token in special else pieces(token) for token in range(max(n_vocab, ends[-1] + 1))]
        tokens = [b"" if piece.startswith(_CONTROL) else piece for piece in tokens]
        for token, text in special.items():
            tokens[token] = text
        return GuidanceVocabulary(tokens, [token for token in special if tokens[token]], ends[0]).build(ends)

    def compile(self, grammar: Grammar, delivered: Sequence[int] = ()) -> "GrammarState":
        """Returns the constraint of a sequence whose output so far is ``delivered``. Raises GrammarError.

        Takes at most a second or two, without the interpreter's lock.
        """
        source = _for_llguidance(grammar)
        if wrong := self._sandbox.run(source):
            raise GrammarError(explain(wrong, syntax=grammar.syntax, source=grammar.source))
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(explain(matcher.get_error(), syntax=grammar.syntax, source=grammar.source))
        if not matcher.consume_tokens(list(delivered)):
            raise GrammarError("the tokens delivered so far do not match it")
        constraint = GrammarState(matcher, self._n_vocab, self._threads)
        if not constraint.finished:
            constraint.mask()
        return constraint

    def close(self) -> None:
        """Ends the threads and the sandbox."""
        self._threads.shutdown()
        self._sandbox.close()


@final
class GrammarState:
    """The tokens that one sequence may continue with. For one thread at a time. Masks are computed in other threads."""

    def __init__(self, matcher: LLMatcher, n_vocab: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._n_vocab = n_vocab
        self._threads = threads
        self._next: Future[Mask] | None = None
        self._finished = matcher.is_stopped()
        self.spared = False
        """Whether the last token passed to ``allows`` was allowed, so that the next mask may be unnecessary too."""

    @property
    def finished(self) -> bool:
        """Whether the output matches and only its end can follow."""
        return self._finished

    def prepare(self) -> None:
        """Starts to compute the next mask in another thread, unless that has begun."""
        if self._next is None:
            self._next = self._threads.submit(self._compute)

    def mask(self) -> Mask:
        """Returns an array of shape (n_vocab,), true for the tokens allowed next. Raises GrammarError.

        If the output may end, all tokens that end generation are allowed.
        """
        self.prepare()
        assert self._next is not None
        return self._next.result()

    def allows(self, token: int) -> bool:
        """Whether ``token`` is allowed, without computing the mask unless that has begun. Raises GrammarError."""
        begun = self._next
        self.spared = self._matcher.validate_tokens([token]) == 1 if begun is None else bool(begun.result()[token])
        return self.spared

    def accept(self, token: int) -> None:
        """Advances past a token. Raises GrammarError if it is not allowed."""
        if self._next is not None:
            self._next.exception()  # the matcher is for one thread at a time
            self._next = None
        if not self._matcher.consume_token(token):
            raise GrammarError(explain(self._matcher.get_error(), syntax="lark", source=""))
        self._finished = self._matcher.is_stopped()

    def _compute(self) -> Mask:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(explain(self._matcher.get_error(), syntax="lark", source=""))
        return np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)


def _for_llguidance(grammar: Grammar) -> str:
    """Raises GrammarError."""
    if len(grammar.source) > LONGEST_SOURCE:
        raise GrammarError(f"it has {len(grammar.source)} characters; at most {LONGEST_SOURCE} are accepted")
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
    """Raises GrammarError for a schema that is invalid or cannot be enforced."""
    try:
        schema: JsonValue = json.loads(source, parse_constant=_number, parse_float=_number)
        return guided(enforced(schema).schema)
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except SchemaError as error:
        raise GrammarError(str(error)) from None
    except ValueError as error:
        raise GrammarError(f"it is not JSON: {error}") from None


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
