"""What ``/set`` sets in ``exo chat``: the fields of a chat request, checked as the server would check them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast, final

from pydantic import JsonValue, ValidationError

from exo.cli.run import read_text
from exo.exit_code import CommandError

SETTINGS: Mapping[str, str] = {
    "system": "what the model is told before the conversation",
    "temperature": "0 to 2; 0 always takes the most probable token",
    "top_p": "0 to 1: keep the most probable tokens up to this sum",
    "top_k": "keep this many tokens; 0 keeps all",
    "min_p": "0 to 1: drop tokens below this share of the largest",
    "repetition_penalty": "1 is none",
    "presence_penalty": "-2 to 2",
    "frequency_penalty": "-2 to 2",
    "max_tokens": "most tokens of an answer",
    "seed": "same seed, same answer",
    "stop": "text that ends an answer, or a JSON list of texts",
    "reasoning_effort": "none, minimal, low, medium, high or xhigh",
    "tools": "a JSON file with a list of tools, as OpenAI's API has them",
}
"""Name and meaning."""
_TEXTS = ("system", "tools", "reasoning_effort")
"""Taken as they are typed; the others are JSON, or failing that text."""


class SettingError(Exception):
    """A setting that cannot be used; the message names it and says what would be accepted."""


@final
class ChatSettings:
    """The settings of one chat. A setting that is not there is the model card's, or the server's default."""

    def __init__(self, given: Mapping[str, JsonValue] | None = None) -> None:
        self._values: dict[str, JsonValue] = dict(given or {})

    def set(self, name: str, text: str) -> None:
        """Sets ``name`` to what ``text`` says; an empty one takes it back. Raises SettingError."""
        if name not in SETTINGS:
            raise SettingError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
        if not text:
            self._values.pop(name, None)
            return
        value = _tools(text) if name == "tools" else text if name in _TEXTS else _json_or_text(text)
        if name != "system":
            _check(name, value)
        self._values[name] = value

    def lines(self) -> list[str]:
        """Every setting: what it is now or, where it is nothing, what it means."""
        return [f"{name:20}{self._shown(name)}" for name in SETTINGS]

    def _shown(self, name: str) -> str:
        if name not in self._values:
            return f"not set ({SETTINGS[name]})"
        value = self._values[name]
        return f"{len(value)} of them" if name == "tools" and isinstance(value, list) else str(value)

    def messages(self) -> list[dict[str, JsonValue]]:
        """Those that precede the conversation."""
        return [{"role": "system", "content": self._values["system"]}] if "system" in self._values else []

    def fields(self) -> dict[str, JsonValue]:
        """Of the request, besides its messages."""
        return {name: value for name, value in self._values.items() if name != "system"}


def _json_or_text(text: str) -> JsonValue:
    try:
        return cast(JsonValue, json.loads(text))
    except ValueError:
        return text


def _tools(text: str) -> JsonValue:
    try:
        return cast(JsonValue, json.loads(read_text("tools", Path(text).expanduser())))
    except CommandError as error:
        raise SettingError(str(error)) from error
    except ValueError as error:
        raise SettingError(f"tools: {text} is not JSON: {error}") from error


def _check(name: str, value: JsonValue) -> None:
    """By the server's own rules, which are imported here because a chat may never need them."""
    from exo.api.http.errors import from_validation
    from exo.api.openai.chat_request import ChatCompletionRequest

    try:
        ChatCompletionRequest.model_validate(
            {"model": "any", "messages": [{"role": "user", "content": "any"}], name: value}
        )
    except ValidationError as error:
        raise SettingError(str(from_validation(error))) from error
