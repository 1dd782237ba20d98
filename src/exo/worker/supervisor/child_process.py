"""The operating-system side of a runner: spawn, pipes, signals, reaping. Knows no states and no requests."""

import asyncio
import fcntl
import logging
import os
import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO, cast, final

import anyio
from pydantic import ValidationError

from exo.worker.protocol.messages import LINE_BYTES, Command, Event
from exo.worker.protocol.wire import decode_event, describe, encode, named_request
from exo.worker.supervisor.crash_report import without_backtrace

log = logging.getLogger(__name__)

_EXIT_SECONDS = 2.0
"""How long a child that has closed its output may take to exit, and its pipes to run dry after that."""
REAP_SECONDS = 20.0
"""How long a child may take to exit after SIGKILL. The driver may need seconds to free the memory of a large model; a
child in uninterruptible sleep never exits."""

_STDIN, _STDOUT, _STDERR = 0, 1, 2

_LOG_BYTES = 8 << 20
_UNWRITTEN_BYTES = 8 << 20
"""What waits for a slow disk; more is left out of the file."""
_LOG_CLOSE_SECONDS = 1.0
_TAIL_BYTES = 32 << 10
_SHOWN_CHARACTERS = 4 << 10
_TAIL_LINES = 20


class ProtocolError(Exception):
    """The child said something that the contract does not allow; it can no longer be trusted.

    ``request`` is whose answer it was, where that is known.
    """

    def __init__(self, message: str, request: str | None = None) -> None:
        super().__init__(message)
        self.request = request


@final
class StderrLog:
    """What a child writes to standard error: appended to a file that is emptied at 8 MiB, the end kept in memory.

    A thread writes the file, so that a slow disk holds up no event loop. A log that another process writes is left
    alone: this one then goes to a file with a number in its name. Raises ``OSError`` if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(path)
        self._tail = b""
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._queued = 0
        """Bytes that were given to the thread, which alone counts ``_done``."""
        self._done = 0
        self._thread = Thread(target=self._write_all, name="runner log", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Keeps ``data``. A full or slow disk costs the file its lines and nothing else."""
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._queued - self._done <= _UNWRITTEN_BYTES:
            self._queued += len(data)
            self._queue.put(data)

    def last_lines(self) -> str:
        """At most the last 20 lines and 4 KiB, without a debugger's backtrace."""
        lines = without_backtrace(self._tail.decode(errors="replace").splitlines())
        return "\n".join(lines[-_TAIL_LINES:])[-_SHOWN_CHARACTERS:]

    def close(self) -> None:
        """Has the file closed once everything is in it, and waits a second for that. ``last_lines`` still answers."""
        self._queue.put(None)
        self._thread.join(_LOG_CLOSE_SECONDS)

    def _write_all(self) -> None:
        while (data := self._queue.get()) is not None:
            with suppress(OSError):
                if self._file.tell() > _LOG_BYTES:
                    self._file.truncate(0)
                self._file.write(data)
            self._done += len(data)
        self._file.close()


def _open_alone(path: Path) -> BinaryIO:
    """Opens a log to append to it, or the first of ``name-server-2.log`` and so on that no other process has open."""
    for number in count(1):
        own = path if number == 1 else path.with_stem(f"{path.stem}-server-{number}")
        file = own.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        except OSError:
            pass  # a file system without locks
        return file
    raise AssertionError  # count never ends


@final
class ChildProcess(asyncio.SubprocessProtocol):
    """A process that reads commands and writes events; made by ``spawn``.

    The event loop calls it with what the process writes, so no task stands between a token and those who wait for it.
    """

    def __init__(self, log: StderrLog) -> None:
        self.exited = asyncio.Event()
        """Set once the process has been reaped."""
        self.closed = asyncio.Event()
        """Set once its pipes are closed, too."""
        self._log = log
        self._hear: Callable[[Event], None] | None = None
        self._heard_out: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unread = bytearray()
        """Output without a line's end, or that nobody listens to yet."""
        self.writable = asyncio.Event()
        """Set while little of what was written waits for room in the pipe, and once the pipe is closed."""
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By protocol, not by class: uvloop has its own.
        self._process = cast(asyncio.SubprocessTransport, transport)
        self._stdin = cast(asyncio.WriteTransport, self._process.get_pipe_transport(_STDIN))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == _STDERR:
            self._log.write(data)
        elif self._hear is None:
            self._unread += data
        else:
            self._read(data, self._hear)

    def pause_writing(self) -> None:
        """Called by the loop while the pipe is full."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """Called by the loop when there is room again."""
        self.writable.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == _STDIN:
            self.writable.set()
        if fd == _STDOUT and not self._heard_out.done():
            self._heard_out.set_result(None)

    def process_exited(self) -> None:
        """Helpers that the child started must not keep its pipes, or a device, open.

        The number of their group is not free for another as long as one of them lives.
        """
        _signal_group(self.pid, signal.SIGKILL)
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    @property
    def pid(self) -> int:
        """The number of the process, which is another's once this one is reaped."""
        return self._process.get_pid()

    def send(self, command: Command) -> None:
        """Writes a command, as ``write`` does."""
        self.write(encode(command))

    def write(self, line: bytes) -> None:
        """Writes a line, or has the loop write it when there is room in the pipe; never waits for that.

        A line that a dead child cannot get is dropped.
        """
        if not self._stdin.is_closing():
            self._stdin.write(line)

    def end_input(self) -> None:
        """Closes the child's standard input once what is under way has been written."""
        self._stdin.close()

    async def listen(self, hear: Callable[[Event], None]) -> None:
        """Has ``hear`` called with each event, from the first on, and returns when the child closes its output.

        Raises ``ProtocolError`` for a line that is no event, and whatever ``hear`` raises; it is not called again then.
        Half a line at the end is what a dying child could not finish, and is dropped.
        """
        self._hear = hear
        early, self._unread = bytes(self._unread), bytearray()
        self._read(early, hear)
        await self._heard_out

    def _read(self, data: bytes, hear: Callable[[Event], None]) -> None:
        *lines, rest = data.split(b"\n")
        if lines and self._unread:
            lines[0] = bytes(self._unread) + lines[0]
            self._unread.clear()
        self._unread += rest
        try:
            if len(self._unread) > LINE_BYTES:
                raise ProtocolError(f"it wrote a line of more than {LINE_BYTES} bytes", named_request(self._unread))
            for line in lines:
                if self._heard_out.done():
                    return
                try:
                    event = decode_event(line)
                except ValidationError as error:
                    said = f"it wrote {line[:80]!r}: {describe(error)[1]}"
                    raise ProtocolError(said, named_request(line)) from None
                hear(event)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for the one who listens
            if not self._heard_out.done():
                self._heard_out.set_exception(error)

    async def exit(self) -> str:
        """Waits until the child has exited, two seconds at most, and says how it did: "exited with code 1"."""
        with anyio.move_on_after(_EXIT_SECONDS):
            await self.exited.wait()
        match self._process.get_returncode():
            case None:
                return "closed its output and did not exit"
            case code if code < 0:
                return f"was killed by {_signal_name(-code)}"
            case code:
                return f"exited with code {code}"

    def signal(self, number: signal.Signals) -> None:
        """To the child and whatever it has started: it leads a session of its own. Nothing once it is reaped."""
        if self._process.get_returncode() is None:
            _signal_group(self.pid, number)

    def cut_off(self) -> None:
        """Ends the child at once; what it still says is not heard."""
        self.signal(signal.SIGKILL)
        if not self._heard_out.done():
            self._heard_out.set_result(None)

    async def close(self) -> None:
        """Ends the child if need be, and reaps it. What it has written to standard error is read, for two seconds.

        A child that does not exit after SIGKILL is abandoned, so that it cannot hold up the server for ever.
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


@asynccontextmanager
async def spawn(command: Sequence[str], log: StderrLog) -> AsyncGenerator[ChildProcess]:
    """Starts ``command``; on leaving, it is killed if need be and reaped, and its standard error is in ``log``.

    Raises ``OSError`` if it cannot be started.
    """
    loop = asyncio.get_running_loop()
    child = ChildProcess(log)
    with anyio.CancelScope(shield=True):  # half of it would leave a process that nobody knows
        # A session of its own, so that an interrupt from the terminal reaches the server alone.
        await loop.subprocess_exec(lambda: child, *command, start_new_session=True)
    try:
        yield child
    finally:
        await child.close()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _signal_name(number: int) -> str:
    return next((each.name for each in signal.Signals if each.value == number), f"signal {number}")
