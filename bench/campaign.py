"""Keeps eight streams running while the runner is killed and stopped and floods of requests come."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import psutil

from bench.streams import Burst, ExpectedReply, WatchedStream, client_of, text_of
from bench.target import STREAMS, FaultTarget
from tests.support.server import ServeProgram

Kind = Literal["kill", "early kill", "stop", "flood"]

MAX_QUEUE = 16
"""Sequences that may wait in the server."""
FLOOD = 10 * MAX_QUEUE
"""Requests of a flood."""
_FLOOD_SECONDS = 1.0
_FLOOD_TOKENS = 8
_EARLY_SHARE = 0.1
_POLL_SECONDS = 0.01
_SETTLE_SECONDS = 0.03


def plan(kills: int, stops: int, floods: int, dice: random.Random) -> list[Kind]:
    """The faults in a random order. Some kills come early, while the replacement of a killed runner still loads.

    Two early kills never follow each other: a third start without success would be a crash loop, which has other rules.
    """
    counts: dict[Kind, int] = {"kill": kills, "stop": stops, "flood": floods}
    kinds: list[Kind] = [kind for kind, count in counts.items() for _ in range(count)]
    dice.shuffle(kinds)
    for at in range(1, len(kinds)):
        if kinds[at - 1] == kinds[at] == "kill" and dice.random() < _EARLY_SHARE:
            kinds[at] = "early kill"
    return kinds


@dataclass(slots=True)
class InjectedFault:
    """A death of the runner at ``died``. ``seconds`` later a stream had its next token.

    ``in_flight`` streams had received some of their tokens.
    """

    kind: Kind
    died: float
    in_flight: int
    seconds: float | None = None
    """None if the next death came first."""


@dataclass(slots=True)
class CampaignOutcome:
    undisturbed: list[WatchedStream] = field(default_factory=list[WatchedStream])
    streams: list[WatchedStream] = field(default_factory=list[WatchedStream])
    faults: list[InjectedFault] = field(default_factory=list[InjectedFault])
    flood: Burst = field(default_factory=Burst)
    declined: Counter[int] = field(default_factory=Counter[int])
    """Streams that were told to come again before they began, by status."""
    seconds: float = 0.0
    finished: bool = False
    """Whether every fault happened within the time limit."""


class Campaign:
    """The faults of ``kinds`` on a server that runs ``target``. ``load_seconds`` is the time of a load."""

    def __init__(
        self, server: ServeProgram, target: FaultTarget, kinds: Sequence[Kind], dice: random.Random, load_seconds: float
    ) -> None:
        self.outcome = CampaignOutcome()
        self._server = server
        self._client = client_of(server.url)
        self._target = target
        self._kinds = kinds
        self._dice = dice
        self._load_seconds = load_seconds
        self._running: dict[int, WatchedStream] = {}
        self._over = False
        self._token = asyncio.Event()
        """Set when a token has come since the last death."""
        self._any_token = asyncio.Event()
        self._flood_request = ExpectedReply(target.body(0), _FLOOD_TOKENS)

    async def undisturbed(self) -> None:
        """Runs the streams without faults, for comparison. Raises SystemExit if one fails."""
        streams = [WatchedStream(number, self._target.tokens) for number in range(STREAMS)]
        await asyncio.gather(*(each.read(self._client, self._target.body(each.number)) for each in streams))
        if broken := [each.error for each in streams if not (each.done and each.usage_exact)]:
            raise SystemExit(f"even without faults a stream fails: {broken[0] or 'its usage is wrong'}")
        self.outcome.undisturbed = streams
        if self._target.exact:
            text = await text_of(self._client, self._flood_request)
            self._flood_request = replace(self._flood_request, text=text)

    async def run(self, limit: float) -> None:
        began = time.perf_counter()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit), asyncio.TaskGroup() as tasks:
                for number in range(STREAMS):
                    tasks.create_task(self._keep_streaming(number))
                await self._disturb(tasks)
                self._over = True
            self.outcome.finished = True
        self.outcome.seconds = time.perf_counter() - began

    async def _keep_streaming(self, number: int) -> None:
        while not self._over:
            stream = WatchedStream(number, self._target.tokens)
            self._running[number] = stream
            await stream.read(self._client, self._target.body(number), self._on_tokens)
            del self._running[number]
            if stream.refused:
                self.outcome.declined[stream.refused] += 1
                await asyncio.sleep(0.25)
            else:
                self.outcome.streams.append(stream)

    def _on_tokens(self) -> None:
        if self.outcome.faults and not self._token.is_set():
            self.outcome.faults[-1].seconds = time.perf_counter() - self.outcome.faults[-1].died
        self._token.set()
        self._any_token.set()

    async def _disturb(self, tasks: asyncio.TaskGroup) -> None:
        for kind in self._kinds:
            if kind == "early kill":
                await asyncio.sleep(self._dice.uniform(0, self._load_seconds))
            else:
                await self._token.wait()
                await asyncio.sleep(self._dice.uniform(0, self._target.longest_pause))
            if kind == "flood":
                tasks.create_task(self._flood())
            else:
                await self._strike(kind)
        await self._token.wait()

    async def _strike(self, kind: Kind) -> None:
        """Ends the runner, and returns when there is another."""
        if kind == "early kill" and self._token.is_set():
            kind = "kill"
        victims = await self._runners_but(set())
        while kind != "early kill" and not self._in_flight():
            await self._token_after_now()
        died = time.perf_counter()
        for pid in victims:
            os.kill(pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        await self._runners_but(victims)
        # After this, everything from the dead runner has been read, and the new one has not sent its first token.
        await asyncio.sleep(_SETTLE_SECONDS)
        cut = self._in_flight()
        for stream in cut:
            stream.cut(died)
        self._token.clear()
        self.outcome.faults.append(InjectedFault(kind, died, len(cut)))

    def _in_flight(self) -> list[WatchedStream]:
        return [stream for stream in self._running.values() if stream.in_flight]

    async def _token_after_now(self) -> None:
        """Waits for another token of any stream."""
        self._any_token = asyncio.Event()
        await self._any_token.wait()

    async def _runners_but(self, gone: set[int]) -> set[int]:
        """Waits for runners none of which is in ``gone``, and returns them. There is no event to wait for."""
        while not (now := self._runners()) or now & gone:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)
        return now

    def _runners(self) -> set[int]:
        """The process ids of the runners, without their children."""
        found: set[int] = set()
        for process in self._server.runners():
            with suppress(psutil.NoSuchProcess):
                if process.ppid() == self._server.process.pid:
                    found.add(process.pid)
        return found

    async def _flood(self) -> None:
        """Sends ten times as many requests as fit into the queue, within a second."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(FLOOD):
                tasks.create_task(self.outcome.flood.ask(self._client, self._flood_request))
                await asyncio.sleep(_FLOOD_SECONDS / FLOOD)
