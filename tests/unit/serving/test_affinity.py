from pydantic import JsonValue

from exo.serving.affinity import PrefixAffinity, prefix_keys
from exo.serving.request import Conversation, Infill, Prompt


def talk(*contents: str) -> Conversation:
    messages: list[dict[str, JsonValue]] = [{"role": "user", "content": each} for each in contents]
    return Conversation(messages=tuple(messages))


def found(before: Prompt, now: Prompt, model: str = "me/model") -> str | None:
    affinity = PrefixAffinity()
    affinity.note(prefix_keys("me/model", [before]), "cuda-1")
    return affinity.find(prefix_keys(model, [now]))


def test_a_conversation_that_goes_on_is_known() -> None:
    assert found(talk("a", "b"), talk("a", "b", "c", "d")) == "cuda-1"
    assert found(talk("a", "b"), talk("a", "x")) == "cuda-1"
    assert found(talk("a", "b"), talk("x", "b")) is None
    assert found(talk("a"), talk("a"), model="me/other") is None


def test_a_text_that_begins_in_the_same_way_is_known() -> None:
    text = "once upon a time " * 200
    assert found(text, text + "there was") == "cuda-1"
    assert found(text, "x" + text) is None
    assert found("short", "short") == "cuda-1"
    assert found(tuple(range(3000)), (*range(3000), 7)) == "cuda-1"
    assert found(tuple(range(3000)), (7, *range(3000))) is None
    assert found(Infill(prefix=text, suffix="a"), Infill(prefix=text, suffix="b")) == "cuda-1"


def test_the_longest_beginning_decides() -> None:
    affinity = PrefixAffinity()
    affinity.note(prefix_keys("me/model", [talk("a", "b")]), "cuda-1")
    affinity.note(prefix_keys("me/model", [talk("a", "c")]), "cuda.gpu2-1")
    assert affinity.find(prefix_keys("me/model", [talk("a", "b", "d")])) == "cuda-1"
    assert affinity.find(prefix_keys("me/model", [talk("a", "z")])) == "cuda.gpu2-1"
    assert affinity.find(()) is None
    assert prefix_keys("me/model", [()]) == ()


def test_what_is_remembered_is_bounded() -> None:
    affinity = PrefixAffinity()
    first = prefix_keys("me/model", [talk("first")])
    affinity.note(first, "cuda-1")
    for number in range(20_000):
        affinity.note([number.to_bytes(8, "big")], "cuda-1")
    assert affinity.find(first) is None
