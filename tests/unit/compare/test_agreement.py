"""Counting tokens that two engines have in common."""

from exo.compare.agreement import Parting, agreement, partings
from exo.compare.comparison import Difference, MemoryUse, Speed
from exo.compare.generation import Generated
from exo.compare.scoring import Tokens


def generated(texts: tuple[Tokens, ...], choices: tuple[Tokens, ...] | None = None) -> Generated:
    """The same greedily and seeded."""
    speed = Speed(prefill_tokens=0, prefill_seconds=0, decode_tokens=0, decode_seconds=0)
    memory = MemoryUse(resident_ready=0, resident_peak=0, device_peak=None)
    both = {"texts": texts, "choices": texts if choices is None else choices}
    return Generated(
        texts={"greedy": both["texts"], "seeded": ()},
        choices={"greedy": both["choices"], "seeded": ()},
        speed=speed,
        memory=memory,
    )


def test_texts_and_choices_are_counted_apart() -> None:
    """The second text parts for good after two tokens; after the reference's own text only two choices differ."""
    reference = generated(((1, 2, 3, 4), (5, 6, 7, 8)))
    other = generated(((1, 2, 3, 4), (5, 6, 9, 9)), ((1, 2, 3, 4), (5, 6, 9, 9)))
    found = partings(reference, other)
    assert found == [Parting("greedy", 1, 2, 7, 9), Parting("greedy", 1, 3, 8, 9)]
    judged = [
        Difference(
            prompt=each.prompt,
            position=each.position,
            reference_token=each.reference_token,
            other_token=each.other_token,
            margin=0,
            near_tie=True,
        )
        for each in found[:1]
    ]
    counts = agreement("greedy", reference, other, judged)
    assert (counts.sequences, counts.identical, counts.tokens, counts.equal) == (2, 1, 8, 6)
    assert counts.chosen_alike == 7
