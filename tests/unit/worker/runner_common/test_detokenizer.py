from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from exo.worker.runner_common.detokenizer import TextStream
from tests.support.bytes_vocabulary import CONTROL, END, BytesVocabulary

ALPHABET = st.text(alphabet="abé😀 <|>", max_size=40)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(edges)]


def run(pieces: list[bytes], stop: list[str]) -> tuple[list[str], str | None]:
    stream = TextStream(stop)
    shown = [stream.push(piece) for piece in pieces]
    return [*shown, stream.finish()], stream.stopped_by


def expected(text: str, stop: list[str]) -> str:
    """By definition: the text up to the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(
    ALPHABET, st.lists(st.text(alphabet="abé😀 <|>", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 99))
)
def test_what_is_shown_does_not_depend_on_how_bytes_arrive(text: str, stop: list[str], cuts: list[int]) -> None:
    shown, stopped_by = run(split(text.encode(), cuts), stop)
    assert "".join(shown) == expected(text, stop)
    assert (stopped_by is not None) == any(s in text for s in stop)


@given(st.binary(max_size=30), st.lists(st.integers(0, 99)))
def test_any_bytes_give_valid_text(data: bytes, cuts: list[int]) -> None:
    shown, _ = run(split(data, cuts), [])
    assert "".join(shown) == data.decode(errors="replace")


def test_a_character_split_over_tokens_appears_once_whole() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]


def test_only_a_possible_beginning_is_held_back() -> None:
    stream = TextStream(["###"])
    assert [stream.push(piece) for piece in (b"one #", b"# two", b" ##", b"#")] == ["one ", "## two", " ", ""]
    assert stream.stopped_by == "###"
    assert stream.push(b"more") == ""
    assert stream.finish() == ""


def test_text_held_back_for_nothing_comes_at_the_end() -> None:
    stream = TextStream(["stop"])
    assert stream.push(b"don't sto") == "don't "
    assert stream.finish() == "sto"
    assert stream.stopped_by is None


def test_the_stop_string_that_is_complete_first_wins() -> None:
    stream = TextStream(["bcde", "cd"])
    assert stream.push(b"abcde") == "ab"
    assert stream.stopped_by == "cd"


def test_control_tokens_match_by_name_and_are_not_shown() -> None:
    vocabulary = BytesVocabulary()
    stream = TextStream(["a<c><end>b", "never<c>"])
    assert [stream.take(token, vocabulary) for token in (*b"xa", CONTROL, *b"y")] == ["x", "", "", "ay"]
    assert [stream.take(token, vocabulary) for token in (*b"a", CONTROL, END, *b"b")] == ["", "", "", ""]
    assert (stream.finish(), stream.stopped_by) == ("", "a<c><end>b")
    held = TextStream(["a<c>b"])
    assert [held.take(token, vocabulary) for token in (*b"a", CONTROL)] == ["", ""]
    assert (held.finish(), held.stopped_by) == ("a", None)
