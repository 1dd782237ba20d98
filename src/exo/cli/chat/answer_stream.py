"""Reads a streamed answer of the server."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import httpx

from exo.chat.output.events import Arguments, BrokenCall, Content, Part, Reasoning, ToolCall
from exo.cli.server.http_client import foreign, refusal, told
from exo.exit_code import CommandError


@dataclass(frozen=True, slots=True)
class Note:
    """The server's progress before the first token, such as "loading 3/18"."""

    text: str


@dataclass(frozen=True, slots=True)
class CallId:
    """The id that the result of call ``index`` must name."""

    index: int
    id: str


AnswerEvent = Note | Part | CallId


@contextmanager
def answer(client: httpx.Client, body: Mapping[str, object]) -> Generator[Iterator[AnswerEvent]]:
    """Sends a chat or completion request with OpenAI's body and yields the events of its answer.

    Leaving the context early stops the generation. Raises CommandError.
    """
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    try:
        # No time limit: a large model may load for minutes, and the server reports its progress.
        with client.stream("POST", path, json={**body, "stream": True}, timeout=None) as reply:
            if reply.status_code != 200:
                raise refusal(client, reply.read())
            yield _events(client, reply)
    except httpx.HTTPError as error:
        raise CommandError(f"the connection to the server at {client.base_url} broke: {error}") from error


@final
class _StreamedCall:
    """The current call of a stream. A stream does not mark broken calls: their arguments are not a JSON object."""

    def __init__(self) -> None:
        self._index: int | None = None
        self._arguments: list[str] = []

    def before(self, part: Part | CallId) -> Iterator[BrokenCall]:
        """Takes the next part. It may end the call before it, and yields whether that call is broken."""
        match part:
            case CallId():
                pass
            case Arguments(_, text):
                self._arguments.append(text)
            case _:
                yield from self.end(cut_off=False)
                self._index = part.index if isinstance(part, ToolCall) else None

    def end(self, *, cut_off: bool) -> Iterator[BrokenCall]:
        """Ends the current call, if there is one."""
        index, text = self._index, "".join(self._arguments)
        self._index, self._arguments = None, []
        if index is None:
            return
        try:
            whole = isinstance(json.loads(text), dict)
        except ValueError:
            whole = False
        if not whole:
            yield BrokenCall(index, cut_off)


def _events(client: httpx.Client, reply: httpx.Response) -> Iterator[AnswerEvent]:
    ended = False
    call = _StreamedCall()
    for line in reply.iter_lines():
        if line.startswith(": "):
            yield Note(line[2:])
        elif line == "data: [DONE]":
            ended = True
        elif line.startswith("data: "):
            try:
                event = json.loads(line[6:])
                if "error" in event:
                    raise told(event["error"])
                parts = [part for choice in event["choices"] for part in _parts(choice)]
                finish = next(
                    (choice["finish_reason"] for choice in event["choices"] if "finish_reason" in choice), None
                )
            except (ValueError, KeyError, TypeError) as error:
                raise foreign(client) from error
            for part in parts:
                yield from call.before(part)
                yield part
            if finish is not None:
                yield from call.end(cut_off=finish == "length")
    if not ended:
        raise CommandError(f"the server at {client.base_url} ended its answer early")


def _parts(choice: Mapping[str, Any]) -> Iterator[Part | CallId]:
    if text := choice.get("text"):
        yield Content(text)
    delta = choice.get("delta", {})
    if text := delta.get("reasoning_content"):
        yield Reasoning(text)
    if text := delta.get("content"):
        yield Content(text)
    for call in delta.get("tool_calls") or ():
        index, function = call["index"], call["function"]
        if name := function.get("name"):
            yield ToolCall(index, name)
        if name := call.get("id"):
            yield CallId(index, name)
        if text := function.get("arguments"):
            yield Arguments(index, text)
