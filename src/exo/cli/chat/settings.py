"""The settings of ``exo chat``: fields of a chat request, checked by the server's rules."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast, final

from pydantic import JsonValue, ValidationError

from exo.cli.chat.run import read_text
from exo.exit_code import CommandError

SETTINGS: Mapping[str, str] = {
    "system": "the system message",
    "temperature": "0 to 2; 0 always takes the most probable token",
    "top_p": "0 to 1: keep the most probable tokens up to this sum",
    "top_k": "keep this many tokens; 0 keeps all",
    "min_p": "0 to 1: drop tokens below this share of the most probable one",
    "repetition_penalty": "1 is no penalty",
    "presence_penalty": "-2 to 2",
    "frequency_penalty": "-2 to 2",
    "max_tokens": "the most tokens of an answer",
    "seed": "the same seed gives the same answer",
    "stop": "text that ends an answer, or a JSON list of texts",
    "reasoning_effort": "none, minimal, low, medium, high or xhigh",
    "tools": "a JSON file with a list of tools, as OpenAI's API has them",
}
"""Names and meanings."""
_TEXTS = ("system", "tools", "reasoning_effort")
"""Their values are text; those of the others are JSON or, if that fails, text."""


@final
class ChatSettings:
    """The settings of one chat. Without a setting, the model card's or the server's default applies."""

    def __init__(self, given: Mapping[str, JsonValue] | None = None) -> None:
        self._values: dict[str, JsonValue] = dict(given or {})

    def set(self, name: str, text: str) -> None:
        """Sets ``name`` to the value in ``text``; an empty text resets it. Raises CommandError."""
        if name not in SETTINGS:
            raise CommandError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
        if not text:
            self._values.pop(name, None)
            return
        value = _tools(text) if name == "tools" else text if name in _TEXTS else _json_or_text(text)
        if name != "system":
            _check(name, value)
        self._values[name] = value

    def lines(self) -> list[str]:
        """Every setting with its value or, without one, its meaning."""
        return [f"{name:20}{self._shown(name)}" for name in SETTINGS]

    def _shown(self, name: str) -> str:
        if name not in self._values:
            return f"not set ({SETTINGS[name]})"
        value = self._values[name]
        return f"{len(value)} of them" if name == "tools" and isinstance(value, list) else str(value)

    def messages(self) -> list[dict[str, JsonValue]]:
        """The messages that precede the conversation."""
        return [{"role": "system", "content": self._values["system"]}] if "system" in self._values else []

    def fields(self) -> dict[str, JsonValue]:
        """The fields of the request besides its messages."""
        return {name: value for name, value in self._values.items() if name != "system"}


def _json_or_text(text: str) -> JsonValue:
    try:
        return cast(JsonValue, json.loads(text))
    except ValueError:
        return text


def _tools(text: str) -> JsonValue:
    try:
        return cast(JsonValue, json.loads(read_text("tools", Path(text).expanduser())))
    except ValueError as error:
        raise CommandError(f"tools: {text} is not JSON: {error}") from error


def _check(name: str, value: JsonValue) -> None:
    """Applies the server's own rules. They are imported here because few chats need them."""
    from exo.api.http.errors import from_validation
    from exo.api.openai.chat_request import ChatCompletionRequest

    try:
        ChatCompletionRequest.model_validate(
            {"model": "any", "messages": [{"role": "user", "content": "any"}], name: value}
        )
    except ValidationError as error:
        raise CommandError(str(from_validation(error))) from error
