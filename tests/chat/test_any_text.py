"""Any reply in any format: no character is lost, and it does not matter in which pieces it arrives."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exo.chat.output.events import Content, Reasoning, ToolCall
from exo.chat.output.registry import FORMATS
from tests.support.replies import ONE_CALL, form, fragments, read, text_of

NAMES = sorted(ONE_CALL)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(data=st.data())
def test_the_parts_do_not_depend_on_how_the_text_arrives(name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.sampled_from(fragments(name)), max_size=25))
    text = data.draw(st.sampled_from(["", ONE_CALL[name]])) + "".join(pieces)
    inside = data.draw(st.booleans())
    whole = read(form(name), [text], in_reasoning=inside)
    assert read(form(name), text, in_reasoning=inside) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert read(form(name), [text[:cut], text[cut:]], in_reasoning=inside) == whole


@pytest.mark.parametrize("name", [name for name in NAMES if name != "harmony"])
@settings(max_examples=60)
@given(data=st.data())
def test_where_there_is_no_call_no_character_is_lost(name: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(fragments(name)), max_size=25)))
    by = FORMATS[name]
    parts = read(by, text)
    dropped = (*by.opening, *by.frame, *by.stray, *((by.thinking.begin, by.thinking.end) if by.thinking else ()))
    if not any(isinstance(part, ToolCall | Reasoning) for part in parts) and not any(map(text.count, dropped)):
        assert text_of(parts, Content) == text


@pytest.mark.parametrize("name", [*NAMES, "none"])
@settings(max_examples=60)
@given(st.text().filter(lambda text: "<|" not in text))
@example("\ud800")
@example("to=")
@example("<")
@example("a <")
@example("to=x y")
def test_any_text_is_read(name: str, text: str) -> None:
    parts = read(FORMATS[name], text)
    assert not any(isinstance(part, ToolCall) for part in parts)
    assert text_of(parts, Content).strip() == text.strip()
