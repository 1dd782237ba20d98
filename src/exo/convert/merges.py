"""SentencePiece's scores as a list of merges, and back.

SentencePiece merges the two neighbours whose concatenation is the token with the highest score; byte-pair encoding
merges the pair that comes first in a list. So the list holds every split of every token into two, by falling score.
"""

from collections.abc import Iterable, Iterator, Sequence

from exo.convert.report import ConvertError
from exo.convert.tokenizer import TokenType

Merge = tuple[str, str]


def merges_of(tokens: Sequence[str], types: Sequence[TokenType], scores: Sequence[float]) -> list[Merge]:
    """Every split of each normal token into two tokens, by falling score."""
    known = set(tokens)
    normal = [number for number, kind in enumerate(types) if kind == TokenType.NORMAL]
    normal.sort(key=lambda number: -scores[number])
    return [merge for number in normal for merge in _splits(tokens[number], known)]


def _splits(token: str, known: set[str]) -> Iterator[Merge]:
    for end in range(1, len(token)):
        left, right = token[:end], token[end:]
        if left in known and right in known:
            yield left, right


def scores_of(tokens: Sequence[str], types: Sequence[TokenType], merges: Iterable[Merge]) -> list[float]:
    """Scores by which SentencePiece merges as the list does: a token's is its first merge's place, counted down.

    Raises ConvertError for a list that no scores can stand for.
    """
    places: dict[str, int] = {}
    given: set[Merge] = set()
    latest = ""
    for place, (left, right) in enumerate(merges):
        token = left + right
        if token != latest and token in places:
            raise _no_scores(f"{token!r} is merged at place {place} and long before, with others in between")
        latest = token
        places.setdefault(token, place)
        given.add((left, right))
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    for token in normal:
        for left, right in _splits(token, normal):
            if (left, right) not in given:
                raise _no_scores(f"{left!r} and {right!r} are never merged, though {token!r} is a token")
    return [_score(kind, places.get(token, len(given))) for token, kind in zip(tokens, types, strict=True)]


def _score(kind: TokenType, place: int) -> float:
    """llama.cpp's tools give bytes 0 and special tokens -1000, which are never compared with any other."""
    if kind == TokenType.BYTE:
        return 0.0
    return -float(place) if kind == TokenType.NORMAL else -1000.0


def _no_scores(reason: str) -> ConvertError:
    return ConvertError("tokenizer.json: merges", f"{reason}; expected the merges of a SentencePiece vocabulary")
