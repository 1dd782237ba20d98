"""The runner's process, which speaks one JSON object per line."""

import subprocess
import threading
from queue import Empty, SimpleQueue
from typing import final

from exo.worker.engines.llama_cpp.probe import runner_command
from exo.worker.protocol.commands import Command, Shutdown
from exo.worker.protocol.events import Event, Failed
from exo.worker.protocol.wire import decode_event, encode

END_SECONDS = 5.0


class LlamaCppError(Exception):
    """The process cannot serve. Upstream's bootstrap turns it into a failed runner."""


@final
class Child:
    """A process and the thread that reads its events."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(runner_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        threading.Thread(target=self._read, name="llama.cpp", daemon=True).start()

    def send(self, command: Command) -> None:
        """Raises LlamaCppError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(command))
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def get(self, seconds: float) -> Event:
        """Returns the next event. Raises Empty without one, LlamaCppError if the process has failed or ended."""
        event = self._events.get(timeout=seconds)
        if event is None:
            self._events.put(None)
            raise self._ended()
        if isinstance(event, Failed) and event.id is None:
            raise LlamaCppError(f"{event.code}: {event.message}")
        return event

    def wait(self, seconds: float) -> Event:
        """Returns the next event. Heartbeats are events, so silence for so many seconds raises LlamaCppError."""
        try:
            return self.get(seconds)
        except Empty:
            raise LlamaCppError(f"llama.cpp has been silent for {seconds:g} s") from None

    def close(self) -> None:
        """Ends the process."""
        try:
            self.send(Shutdown())
            self._process.wait(END_SECONDS)
        except (LlamaCppError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._events.put(decode_event(line))
        finally:
            self._events.put(None)

    def _ended(self) -> LlamaCppError:
        try:
            return LlamaCppError(f"llama.cpp ended with status {self._process.wait(END_SECONDS)}")
        except subprocess.TimeoutExpired:
            return LlamaCppError("llama.cpp has closed its output")
