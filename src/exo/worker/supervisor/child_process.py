"""The operating-system side of a runner: spawn, pipes, signals, reaping. Knows no states and no requests."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import cast, final

import anyio
from pydantic import ValidationError

from exo.worker.protocol.commands import Command, Embed, Generate, Picture, Rank, Request, Sibling, Text, Tokenize
from exo.worker.protocol.events import Event, Failed
from exo.worker.protocol.messages import LINE_BYTES
from exo.worker.protocol.validation import describe
from exo.worker.protocol.wire import ProtocolError, decode_event, encode, named_request
from exo.worker.supervisor.crash_report import StderrLog

log = logging.getLogger(__name__)

# uvloop runs Python code in the new process before the program. A garbage collection there can free an OpenSSL object
# and wait for ever for a lock that another thread held at the fork. The event loop waits for the program to start.
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable)

_EXIT_SECONDS = 2.0
"""Time for a child that has closed its output to exit, and then for its pipes to run dry."""
REAP_SECONDS = 20.0
"""Time for a child to exit after SIGKILL. The driver may need seconds to free the memory of a large model. A child in
uninterruptible sleep never exits."""

_STDIN, _STDOUT, _STDERR = 0, 1, 2

_LARGE = 1 << 14
"""Characters or token ids from which a prompt is worth a moment's wait for other sequences with the same one."""


@final
class EventLines:
    """Splits a byte stream, which arrives in any pieces, into lines of at most ``LINE_BYTES`` and decodes them."""

    def __init__(self) -> None:
        self._rest = bytearray()  # the beginning of an unfinished line

    def feed(self, data: bytes, on_event: Callable[[Event], None]) -> None:
        """Calls ``on_event`` with each event that ``data`` completes.

        Raises ``ProtocolError`` for a line that is no event or too long, and every exception of ``on_event``.
        """
        *lines, rest = data.split(b"\n")
        if lines and self._rest:
            lines[0] = bytes(self._rest) + lines[0]
            self._rest.clear()
        self._rest += rest
        for line in (*lines[:1], self._rest):  # no other can be so long, since it came in one piece
            if len(line) > LINE_BYTES:
                raise ProtocolError(f"it wrote a line of more than {LINE_BYTES} bytes", named_request(line))
        for line in lines:
            try:
                event = decode_event(line)
            except ValidationError as error:
                message = f"it wrote {line[:80]!r}: {describe(error)[1]}"
                raise ProtocolError(message, named_request(line)) from None
            on_event(event)


@final
class ChildProcess(asyncio.SubprocessProtocol):
    """A process that reads commands and writes events. ``spawn`` makes it.

    The event loop calls it with the process's output, so that no task stands between a token and its reader.
    """

    def __init__(self, log: StderrLog) -> None:
        self.exited = asyncio.Event()  # the process has been reaped
        self.closed = asyncio.Event()  # and its pipes are closed
        self.writable = asyncio.Event()  # little data waits for room in the pipe, or the pipe is closed
        self.writable.set()
        self._log = log
        self._on_event: Callable[[Event], None] | None = None
        self._output_ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._early = bytearray()  # output that came before ``listen``
        self._lines = EventLines()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Casts instead of isinstance: uvloop has transport classes of its own.
        self._process = cast(asyncio.SubprocessTransport, transport)
        self._stdin = cast(asyncio.WriteTransport, self._process.get_pipe_transport(_STDIN))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == _STDERR:
            self._log.write(data)
        elif self._on_event is None:
            self._early += data
        else:
            self._read(data, self._on_event)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == _STDIN:
            self.writable.set()
        if fd == _STDOUT and not self._output_ended.done():
            self._output_ended.set_result(None)

    def process_exited(self) -> None:
        # Helpers that the child started must not keep its pipes, or a device, open. Their group's number stays theirs
        # while one of them lives.
        signal_group(self.pid, signal.SIGKILL)
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    @property
    def pid(self) -> int:
        """The process id. Another process may get it once this one is reaped."""
        return self._process.get_pid()

    def send(self, command: Command) -> None:
        """Writes a command, as ``write`` does."""
        self.write(encode(command))

    def write(self, line: bytes) -> None:
        """Writes a line, or buffers it until the pipe has room; never blocks. Drops it if the child is dead."""
        if not self._stdin.is_closing():
            self._stdin.write(line)

    def end_input(self) -> None:
        """Closes the child's standard input after the buffered data."""
        self._stdin.close()

    async def listen(self, on_event: Callable[[Event], None]) -> None:
        """Has ``on_event`` called with each event, from the first on. Returns when the child closes its output.

        Raises ``ProtocolError`` for a line that is no event, and every exception of ``on_event``, which is not called
        again then. An unfinished last line is dropped: the child died while writing it.
        """
        self._on_event = on_event
        early, self._early = bytes(self._early), bytearray()
        self._read(early, on_event)
        await self._output_ended

    def _read(self, data: bytes, on_event: Callable[[Event], None]) -> None:
        if self._output_ended.done():
            return
        try:
            self._lines.feed(data, on_event)
        except Exception as error:  # noqa: BLE001 - the listener raises it
            if not self._output_ended.done():
                self._output_ended.set_exception(error)

    async def exit(self) -> str:
        """Waits at most two seconds for the child to exit. Returns the outcome, such as "exited with code 1"."""
        with anyio.move_on_after(_EXIT_SECONDS):
            await self.exited.wait()
        match self._process.get_returncode():
            case None:
                return "closed its output and did not exit"
            case code if code < 0:
                name = next((each.name for each in signal.Signals if each.value == -code), f"signal {-code}")
                return f"was killed by {name}"
            case code:
                return f"exited with code {code}"

    def signal(self, number: signal.Signals) -> None:
        """Signals the child and its own children, which are in its session. Does nothing once it is reaped."""
        if self._process.get_returncode() is None:
            signal_group(self.pid, number)

    def cut_off(self) -> None:
        """Kills the child and ignores the rest of its output."""
        self.signal(signal.SIGKILL)
        if not self._output_ended.done():
            self._output_ended.set_result(None)

    async def close(self) -> None:
        """Kills the child if it still runs, and reaps it. Its standard error is read for two more seconds.

        A child that does not exit after SIGKILL is abandoned, so that it cannot block the server.
        """
        self.end_input()
        self.signal(signal.SIGKILL)
        try:
            with anyio.move_on_after(_EXIT_SECONDS):
                await self.closed.wait()
        finally:
            with anyio.move_on_after(REAP_SECONDS, shield=True):
                await self.exited.wait()
            if not self.exited.is_set():
                message = "process %d has not exited %g seconds after SIGKILL and is abandoned; its memory stays taken"
                log.error(message, self.pid, REAP_SECONDS)
            self._process.close()


@final
class Outbox:
    """Holds requests as objects, which share their prompt, until the pipe has room. Other commands overtake them.

    ``sending`` is called with each request as it is written, ``refuse`` with the failure of one that is too large.
    """

    def __init__(
        self, child: ChildProcess, sending: Callable[[Request], None], refuse: Callable[[Failed], None]
    ) -> None:
        self._child = child
        self._sending = sending
        self._refuse = refuse
        self._waiting: dict[str, Request] = {}  # by id, in order of arrival
        self._posted = asyncio.Event()

    def post(self, request: Request) -> None:
        """Takes a request. Writes it at once if it is small and nothing is in its way."""
        self._waiting[request.id] = request
        if len(self._waiting) == 1 and self._child.writable.is_set() and _size(request) < _LARGE:
            self._write_next()
        else:
            self._posted.set()

    def withdraw(self, request: str) -> bool:
        """Drops a request that has not been written; false if it has."""
        return self._waiting.pop(request, None) is not None

    async def run(self) -> None:
        """Writes waiting requests whenever there is room. Does not return."""
        while True:
            await self._posted.wait()
            await self._child.writable.wait()
            if self._waiting:
                self._write_next()
            else:
                self._posted.clear()

    def _write_next(self) -> None:
        first = next(iter(self._waiting.values()))
        siblings = [each for each in self._waiting.values() if each is not first and _is_sibling(first, each)]
        requests = (first, *siblings)
        for request in requests:
            del self._waiting[request.id]
        also = tuple(Sibling(id=each.id, seed=each.sampling.seed) for each in siblings if isinstance(each, Generate))
        line = encode(first.model_copy(update={"also": also}) if also else first)
        if len(line) <= LINE_BYTES:
            for request in requests:
                self._sending(request)
            self._child.write(line)
            return
        message = f"the request takes {len(line)} bytes on its way to the runner; at most {LINE_BYTES} are accepted"
        for request in requests:
            self._refuse(Failed(id=request.id, code="invalid_request", message=message))


def _size(request: Request) -> int:
    match request:
        case Rank():
            return len(request.query) + len(request.document)
        case Generate() | Embed() | Tokenize():
            return sum(map(_part_size, request.prompt))


def _part_size(part: Text | Picture | int) -> int:
    match part:
        case Text():
            return len(part.text)
        case Picture():
            return len(part.png)
        case int():
            return 1


def _is_sibling(first: Request, other: Request) -> bool:
    """Whether two requests share one prompt object and differ in nothing but id and seed."""
    if not (isinstance(first, Generate) and isinstance(other, Generate)):
        return False
    if first.prompt is not other.prompt or first.delivered:
        return False
    sampling = first.sampling.model_copy(update={"seed": other.sampling.seed})
    return first.model_copy(update={"id": other.id, "sampling": sampling}) == other


@asynccontextmanager
async def spawn(command: Sequence[str], log: StderrLog) -> AsyncGenerator[ChildProcess]:
    """Starts ``command``. On leaving, it is killed and reaped, and its standard error is in ``log``.

    Raises ``OSError`` if it cannot be started.
    """
    loop = asyncio.get_running_loop()
    child = ChildProcess(log)
    with anyio.CancelScope(shield=True):  # a cancelled start would leave a process that nobody knows
        # A session of its own, so that Ctrl-C at the terminal reaches the server alone.
        await loop.subprocess_exec(lambda: child, *command, start_new_session=True)
    try:
        yield child
    finally:
        await child.close()


def signal_group(group: int, number: signal.Signals) -> None:
    """Signals all processes of a group, if there are any."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
