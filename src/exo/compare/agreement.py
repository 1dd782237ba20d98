"""Counts the tokens that two engines choose alike, and measures how close their different choices were."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from exo.compare.comparison import MODES, Difference, Mode, TokenAgreement
from exo.compare.engine import ComparedEngine
from exo.compare.generation import Continuations, Generated
from exo.compare.scoring import Scoring, Tokens, score

NEAR_TIE = 0.1
"""The largest margin of a near-tie, in nats."""


@dataclass(frozen=True, slots=True)
class Parting:
    """A different choice than the reference's after the same text."""

    mode: Mode
    prompt: int
    position: int
    """The index of the generated token."""
    reference_token: int
    other_token: int


def partings(reference: Generated, other: Generated) -> list[Parting]:
    """Every choice of ``other`` along the reference's texts that differs from the reference's."""
    return [
        Parting(mode, prompt, position, ours, theirs)
        for mode in MODES
        for prompt, (text, choices) in enumerate(zip(reference.texts[mode], other.choices[mode], strict=True))
        for position, (ours, theirs) in enumerate(zip(text, choices, strict=True))
        if ours != theirs
    ]


def agreement(mode: Mode, reference: Generated, other: Generated, differences: Sequence[Difference]) -> TokenAgreement:
    """The counts, with the differences from ``judge``."""
    pairs = list(zip(reference.texts[mode], other.texts[mode], strict=True))
    equal = [left == right for ours, theirs in pairs for left, right in zip(ours, theirs, strict=True)]
    return TokenAgreement(
        sequences=len(pairs),
        identical=sum(ours == theirs for ours, theirs in pairs),
        tokens=len(equal),
        equal=sum(equal),
        chosen_alike=len(equal) - len(differences),
        differences=tuple(differences),
    )


async def judge(
    engine: ComparedEngine, wanted: Continuations, reference: Generated, found: Sequence[Parting]
) -> dict[Parting, Difference]:
    """How far the reference ``engine`` was from choosing each other token. Raises CompareError."""
    ends: dict[tuple[Mode, int], int] = {}
    for parting in found:
        text = parting.mode, parting.prompt
        ends[text] = max(ends.get(text, 0), parting.position)
    if not ends:
        return {}
    read: list[Tokens] = [
        (*wanted.prompts[prompt], *reference.texts[mode][prompt][:end]) for (mode, prompt), end in ends.items()
    ]
    with TemporaryDirectory(prefix="exo-compare-") as folder:
        scoring = await score(engine, read, Path(folder))
        index = {text: at for at, text in enumerate(ends)}
        return {each: _judge(each, scoring, index[each.mode, each.prompt], wanted) for each in found}


def _judge(parting: Parting, scoring: Scoring, index: int, wanted: Continuations) -> Difference:
    """``scoring`` has, at ``index``, the prompt and at least the reference's tokens before this one."""
    from exo.compare.divergence import greedy_margin, row_after, seeded_margin

    position = len(wanted.prompts[parting.prompt]) + parting.position
    row = row_after(scoring, index, position)
    if parting.mode == "greedy":
        margin = greedy_margin(row, parting.reference_token, parting.other_token)
    else:
        seed = wanted.seed_of(parting.prompt)
        margin = seeded_margin(row, seed, position, parting.reference_token, parting.other_token)
    return Difference(
        prompt=parting.prompt,
        position=parting.position,
        reference_token=parting.reference_token,
        other_token=parting.other_token,
        margin=margin,
        near_tie=margin <= NEAR_TIE,
    )
