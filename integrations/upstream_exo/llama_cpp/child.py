"""The runner's process, which speaks one JSON object per line."""

import subprocess
from queue import Empty, SimpleQueue
from threading import Thread
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
        Thread(target=self._read, name="llama.cpp", daemon=True).start()

    def send(self, command: Command) -> None:
        """Raises LlamaCppError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(command))
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def get(self, seconds: float) -> Event | None:
        """Returns the next event, or None if there is none in this time. Raises LlamaCppError if the process fails."""
        try:
            event = self._events.get(timeout=seconds)
        except Empty:
            return None
        if event is None:
            raise self._ended()
        if isinstance(event, Failed) and event.id is None:
            raise LlamaCppError(f"{event.code}: {event.message}")
        return event

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
