"""A runner that is driven through its pipe, without a server."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from exo.worker.protocol.commands import Command, Generate, Load, SamplingParams, Text
from exo.worker.protocol.events import Deltas, Event, Failed, Finished, Status
from exo.worker.protocol.wire import decode_event, encode


@dataclass(slots=True)
class TimedTokens:
    """When a request was sent, and when each of its tokens was read, in seconds."""

    sent: float
    times: list[float] = field(default_factory=list[float])
    tokens: list[int] = field(default_factory=list[int])


class DirectRunner:
    """One runner process with a model, which gets one greedy request at a time."""

    def __init__(self, command: Sequence[str], load: Load) -> None:
        """Loads the model. ``began_to_load`` and ``ready`` are times in seconds."""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._requests = 0
        self._send(load)
        self.began_to_load = self.ready = 0.0
        while not self.ready:
            event, now = self._read(), time.perf_counter()
            if isinstance(event, Status) and event.state != "Idle":
                self.began_to_load = self.began_to_load or now
                self.ready = now if event.state == "Ready" else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def generate(self, prompt: str, tokens: int) -> TimedTokens:
        """Runs a request of ``tokens`` tokens to its end."""
        self._requests += 1
        request = Generate(
            id=str(self._requests),
            prompt=(Text(text=prompt),),
            sampling=SamplingParams(temperature=0, seed=0),
            max_tokens=tokens,
            ignore_eos=True,
        )
        stream = TimedTokens(time.perf_counter())
        self._send(request)
        while not isinstance(event := self._read(), Finished):
            if isinstance(event, Deltas):
                now = time.perf_counter()
                for delta in event.items:
                    stream.times += [now] * len(delta.tokens)
                    stream.tokens += delta.tokens
        return stream

    def _send(self, command: Command) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(encode(command))
        self._process.stdin.flush()

    def _read(self) -> Event:
        """Exits if the runner fails."""
        assert self._process.stdout is not None
        event = decode_event(self._process.stdout.readline())
        if isinstance(event, Failed):
            raise SystemExit(event.message)
        return event
