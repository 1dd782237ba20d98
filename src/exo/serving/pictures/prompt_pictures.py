"""Pictures in conversations: marks in the text for their places, and their decoding in a sandbox."""

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import final

from pydantic import JsonValue

from exo.chat.sandbox_pool import SandboxBusyError, SandboxPool
from exo.serving.errors import RequestError, busy
from exo.serving.pictures.limits import LIMITS
from exo.serving.warnings import warn
from exo.worker.protocol.commands import Picture, Text
from exo.worker.protocol.messages import PICTURES_BYTES
from exo.worker.runner_common.sandbox import SandboxError

UNSEEN = "[a picture that this model cannot see]"
_MARK = re.compile("(\ufdd2[0-9a-f]{16}\ufdd3)")


@dataclass(frozen=True, slots=True)
class GivenPicture:
    """A picture as a client gave it: a file in base64, or an address."""

    param: str
    """The client's name of the part."""
    data: str = ""
    url: str = ""
    answered: bool = True
    """Whether the reply is about it. Any other picture is replaced by text for a model that sees none, because a client
    cannot take it out of the conversation again."""
    kind: str = ""
    """The part's name without indices, for warnings."""


Given = Mapping[str, GivenPicture]
"""Pictures by the marks in the text that stand for them."""


def new_mark() -> str:
    """Returns a mark that nobody can guess, so that no text can contain it by intention."""
    return f"\ufdd2{token_hex(8)}\ufdd3"


def joined(texts: Sequence[str]) -> str:
    """Joins texts with line breaks, but none before or after a picture."""
    pieces = [""]
    for text in texts:
        apart = len(pieces) > 1 and not (_MARK.fullmatch(text) or _MARK.fullmatch(pieces[-1]))
        pieces += ["\n", text] if apart else [text]
    return "".join(pieces)


def marked(value: JsonValue, given: Given) -> dict[str, GivenPicture]:
    """Returns those of the pictures whose marks are in the texts of ``value``."""
    if isinstance(value, str):
        return {mark: given[mark] for mark in _MARK.findall(value) if mark in given}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {mark: picture for part in parts for mark, picture in marked(part, given).items()}


def told(value: JsonValue) -> JsonValue:
    """Returns ``value`` with sentences in the place of pictures, each on a line of its own."""
    if isinstance(value, str):
        parts = [part if at % 2 == 0 else UNSEEN for at, part in enumerate(_MARK.split(value))]
        return "\n".join(filter(None, parts)) if len(parts) > 1 else value
    if isinstance(value, list):
        return [told(part) for part in value]
    return {name: told(part) for name, part in value.items()} if isinstance(value, dict) else value


def unseen(messages: Sequence[Mapping[str, JsonValue]], given: Given, why: str) -> tuple[dict[str, JsonValue], ...]:
    """Returns the messages for a model that sees no pictures. Raises RequestError for one that the reply is about."""
    for picture in given.values():
        if picture.answered:
            raise RequestError(f"{picture.param}: {why}", code="unsupported_parameter", param=picture.param)
        warn(picture.kind, f"the model reads {UNSEEN!r} in the place of an earlier picture")
    return tuple({name: told(value) for name, value in message.items()} for message in messages)


def placed(texts: Sequence[Text], pictures: Mapping[str, Picture]) -> Iterator[Text | Picture]:
    """Yields a prompt with the pictures in the places of their marks."""
    for text in texts:
        for part in _MARK.split(text.text):
            if part in pictures:
                yield pictures[part]
            elif part:
                yield text if part == text.text else text.model_copy(update={"text": part})


@final
class Pictures:
    """Reads pictures: fetches those with an address, and decodes all of them in sandbox processes."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """``hosts`` are those from which pictures may be fetched."""
        self._hosts = hosts
        self._processes = SandboxPool("exo.serving.pictures.main", LIMITS)

    async def read(self, given: Given) -> dict[str, Picture]:
        """Returns the pictures for a runner, by mark. Raises ``ServingError`` that names the part."""
        found: dict[str, Picture] = {}
        left = PICTURES_BYTES
        for mark, picture in given.items():
            png = await self._decoded(await self._fetched(picture))
            left -= len(png)
            if left < 0:
                raise _wrong(picture, f"all pictures together have more than {PICTURES_BYTES:,} bytes as PNG files")
            found[mark] = Picture(png=png)
        return found

    async def aclose(self) -> None:
        """Ends the processes."""
        await self._processes.aclose()

    async def _fetched(self, picture: GivenPicture) -> GivenPicture:
        if not picture.url:
            return picture
        from exo.serving.pictures.fetch import FetchError, fetch  # few servers fetch any

        try:
            return replace(picture, data=b64encode(await fetch(picture.url, self._hosts)).decode())
        except FetchError as error:
            raise _wrong(picture, str(error)) from None

    async def _decoded(self, picture: GivenPicture) -> str:
        try:
            answer = await self._processes.ask({"data": picture.data})
        except SandboxBusyError as error:
            raise busy(picture.param, error) from None
        except SandboxError as error:
            raise _wrong(picture, f"the picture {error}") from None
        if "error" in answer:
            raise _wrong(picture, f"the picture {answer['error']}")
        return answer["png"]


def _wrong(picture: GivenPicture, why: str) -> RequestError:
    return RequestError(f"{picture.param}: {why}", code="invalid_value", param=picture.param)
