"""Where a folder's chat templates are, and which of them count."""

import json

import pytest

from exo.worker.runner_common.model_files.folder_templates import chat_templates, usual


def found(**files: str) -> dict[str, str]:
    """By file names with __ for a dot."""
    held = {name.replace("__", "."): text.encode() for name, text in files.items()}
    return chat_templates(held.get)


NAMED = json.dumps({"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]})


def test_templates_may_be_in_four_places() -> None:
    assert found() == {}
    assert found(chat_template__json='{"chat_template": "j"}') == {"default": "j"}
    assert found(tokenizer_config__json='{"chat_template": "t"}', chat_template__json='{"chat_template": "j"}') == {
        "default": "t"
    }
    assert found(tokenizer_config__json=NAMED) == {"default": "a", "tool_use": "b"}
    more = {"additional_chat_templates/tool_use.jinja": b"c", "chat_template.jinja": b"d"}
    assert chat_templates({**more, "tokenizer_config.json": NAMED.encode()}.get) == {"default": "d", "tool_use": "c"}


def test_the_only_template_is_the_usual_one() -> None:
    assert usual({"tool_use": "b"}) == "b"
    assert usual({}) is None


@pytest.mark.parametrize("content", ["[", "[]", "[" * 100_000])
def test_a_file_that_cannot_be_read_is_named(content: str) -> None:
    with pytest.raises(ValueError, match=r"has a chat_template\.json that is no JSON object"):
        found(chat_template__json=content)
