"""Patterns with look-ahead, and the same without."""

import re
from random import Random

import pytest

from exo.worker.runner_common.grammar.schema_pattern import without_look_ahead


@pytest.mark.parametrize(
    "pattern",
    [r"^(?!a)[ab.]*$", r"^(?!\.)(?!.*\.\.)[ab.]+$", r"^(?=.*b)[ab]*$", r"^(?!^[.]*$)[ab.]*$", r"^(?![ab]+$)[ab.]*$"],
)
def test_patterns_without_look_ahead_match_the_same_texts(pattern: str) -> None:
    conjuncts = without_look_ahead(pattern)
    assert conjuncts is not None
    drawn = Random(1)
    for _ in range(2000):
        text = "".join(drawn.choices("ab.", k=drawn.randint(0, 6)))
        assert all(re.search(each, text) for each in conjuncts) == bool(re.search(pattern, text)), text


@pytest.mark.parametrize("pattern", [r"^(?!ab)a|b$", r"^(?!a(b|c))a", r"a(?=b)", r"(a)\1", r"^(?=a)*b", r"\bword\b"])
def test_what_is_no_look_ahead_at_the_start_is_left_to_be_refused(pattern: str) -> None:
    assert without_look_ahead(pattern) is None
