"""Framing: one JSON object per line, in both directions."""

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from pydantic import JsonValue, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from exo.worker.protocol.commands import COMMANDS, Command, Generate
from exo.worker.protocol.events import EVENTS, Event, Failed
from exo.worker.protocol.messages import LINE_BYTES, Message
from exo.worker.protocol.validation import describe

_ID = re.compile(rb'"id":\s*"([^"\\]*)"')
_ID_WITHIN = 1 << 10
_ANY_JSON: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


class ProtocolError(Exception):
    """The child sent something that the protocol does not allow, and can no longer be trusted.

    ``request`` is the id of the request that it answered, if known.
    """

    def __init__(self, message: str, request: str | None = None) -> None:
        super().__init__(message)
        self.request = request


def encode(message: Message) -> bytes:
    """The message as one line. A byte of a path that is not UTF-8 becomes a question mark."""
    try:
        return to_json(message) + b"\n"
    except PydanticSerializationError:
        return json.dumps(message.model_dump(), ensure_ascii=False).encode(errors="replace") + b"\n"


def decode_event(line: bytes) -> Event:
    """Raises ``ValidationError`` for anything that is not one whole event."""
    return EVENTS.validator.validate_json(line)  # validates as EVENTS does, without a layer of Python


def take_protocol_stream() -> BinaryIO:
    """Returns a private copy of standard output for the protocol, and points descriptor 1 at standard error.

    A library that prints then cannot corrupt the stream. A runner calls it once, before anything else.
    """
    protocol = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return protocol


def read_commands(stream: BinaryIO) -> Iterator[Command | Failed]:
    """Yields commands until the stream closes. A ``Generate`` for several sequences becomes one for each.

    A line that is too long or not a valid command is yielded as the failure of the request that it names. If it names
    none, it is reported on standard error.
    """
    while line := stream.readline(LINE_BYTES + 1):
        param = None
        if len(line) > LINE_BYTES:
            request, message = named_request(line), f"the command takes more than {LINE_BYTES} bytes"
            while line and not line.endswith(b"\n"):
                line = stream.readline(LINE_BYTES)
        else:
            try:
                command = COMMANDS.validate_json(line)
            except ValidationError as error:
                request = _request_id(line)
                param, message = describe(error)
            else:
                yield from _each(command)
                continue
        if request is not None:
            yield Failed(id=request, code="invalid_request", message=message, param=param)
        else:
            print(f"ignored a line that is not a command: {message}", file=sys.stderr, flush=True)


def _each(command: Command) -> Iterator[Command]:
    if not isinstance(command, Generate) or not command.also:
        yield command
        return
    siblings = command.also
    yield (first := command.model_copy(update={"also": ()}))
    for sibling in siblings:
        sampling = command.sampling.model_copy(update={"seed": sibling.seed})
        yield first.model_copy(update={"id": sibling.id, "sampling": sampling})


def _request_id(line: bytes) -> str | None:
    try:
        value = _ANY_JSON.validate_json(line)
    except ValidationError:
        return None
    found = value.get("id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def named_request(line: bytes | bytearray) -> str | None:
    """The request id at the beginning of a line whose rest is too long, missing or broken."""
    found = _ID.search(line[:_ID_WITHIN])
    return None if found is None else found[1].decode(errors="replace")


def exit_now(code: int) -> NoReturn:
    """Exits without running destructors, which can crash an engine's own threads and libraries."""
    sys.stderr.flush()
    os._exit(code)
